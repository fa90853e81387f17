"""0.3.2's path of saving and loading."""

from opendelta.saving.checkpoint import SaveLoadMixin

__all__ = ["SaveLoadMixin"]
