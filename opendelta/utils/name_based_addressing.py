"""0.3.2's path of the addressing functions."""

from opendelta.addressing.patterns import (
    endswith_in_normal,
    endswith_in_regex,
    is_child_key,
    superstring_in,
)

__all__ = ["endswith_in_normal", "endswith_in_regex", "is_child_key", "superstring_in"]
