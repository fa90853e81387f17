"""0.3.2's path of the inspection functions."""

from opendelta.inspection import (
    inspect_module_statistics,
    inspect_optimizer_statistics,
    num_delta_parameters,
    num_frozen_parameters,
    num_total_parameters,
    num_trainable_parameters,
)

__all__ = [
    "inspect_module_statistics",
    "inspect_optimizer_statistics",
    "num_delta_parameters",
    "num_frozen_parameters",
    "num_total_parameters",
    "num_trainable_parameters",
]
