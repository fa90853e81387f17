"""What a model and its deltas look like: trees, counts, tables, and what the optimizer holds."""

from __future__ import annotations

from opendelta.inspection.log import print_log
from opendelta.inspection.optimizer import inspect_optimizer_statistics
from opendelta.inspection.statistics import (
    inspect_module_statistics,
    num_delta_parameters,
    num_frozen_parameters,
    num_total_parameters,
    num_trainable_parameters,
)
from opendelta.inspection.table import Summary, summary
from opendelta.inspection.visualization import Visualization

__all__ = [
    "Summary",
    "Visualization",
    "inspect_module_statistics",
    "inspect_optimizer_statistics",
    "num_delta_parameters",
    "num_frozen_parameters",
    "num_total_parameters",
    "num_trainable_parameters",
    "print_log",
    "summary",
]
