"""0.3.2's path of the hash functions."""

from opendelta.saving.hashing import gen_model_hash, gen_parameter_hash

__all__ = ["gen_model_hash", "gen_parameter_hash"]
