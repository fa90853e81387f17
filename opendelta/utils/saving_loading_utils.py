"""0.3.2's path of saving and loading."""

from opendelta.center import DeltaCenterArguments, create_default_name, create_delta_center_args
from opendelta.saving.save_load import SaveLoadMixin

__all__ = [
    "DeltaCenterArguments",
    "SaveLoadMixin",
    "create_default_name",
    "create_delta_center_args",
]
