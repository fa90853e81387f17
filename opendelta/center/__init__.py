"""Publishing deltas and finding them: on the Hub, in a folder, in object storage."""

from __future__ import annotations

from opendelta.center.arguments import (
    DeltaCenterArguments,
    create_default_name,
    create_delta_center_args,
)
from opendelta.center.center import DeltaCenter
from opendelta.center.contents import DeltaInfo

__all__ = [
    "DeltaCenter",
    "DeltaCenterArguments",
    "DeltaInfo",
    "create_default_name",
    "create_delta_center_args",
]
