"""0.3.2's path of the inspection functions."""

from opendelta.inspection import inspect_module_statistics, inspect_optimizer_statistics

__all__ = ["inspect_module_statistics", "inspect_optimizer_statistics"]
