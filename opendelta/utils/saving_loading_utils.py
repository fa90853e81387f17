"""0.3.2's path of saving and loading."""

from opendelta.basemodel import DeltaBase as SaveLoadMixin
from opendelta.center import DeltaCenterArguments, create_default_name, create_delta_center_args

__all__ = [
    "DeltaCenterArguments",
    "SaveLoadMixin",
    "create_default_name",
    "create_delta_center_args",
]
