"""0.3.2's path of the signature functions."""

from opendelta.signature import Signature, get_arg_names, get_arg_names_inside_func, signature

__all__ = ["Signature", "get_arg_names", "get_arg_names_inside_func", "signature"]
