"""What a delta notes about itself, in one plain object beside the module.

The children of a delta are called as the modules of its backbone are, its hyper-parameters as its
method likes: neither can collide with what stands here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from opendelta.addressing.targeting import Targeting
from opendelta.delta.config import ConfigFields
from opendelta.mechanism.buffers import Moved
from opendelta.mechanism.insertion import Insertion

KEY = "_record"  # where it stands among a delta's attributes


class Record:
    """The bookkeeping of one delta.

    Attributes:
        arguments: what its constructor was given, defaults included.
        helpers: arguments that only help to construct it, until it is.
        is_made: whether its constructor has returned.
        backbone: the model that it is on.
        config: what it was built by; values of hyper-parameters live here alone.
        base: the base arguments as they are meant: patterns as lists, defaults filled in.
        port: of the web page on which its modules are to be chosen, if so.
        uses_defaults: whether the user named no modules.
        insertions: what it has put on the backbone.
        left_trainable: names of the backbone's parameters that its last freeze left trainable.
        moved: persistent buffers of the backbone as its training left them.
        removed: whether it was taken off for good.
        from_file: whether its config was read from a file.
        plan: the `Plan` of what it is about to do, while that is being made.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.helpers: dict[str, Any] = {}
        self.is_made = False
        self.backbone: nn.Module
        self.config: ConfigFields
        self.base: dict[str, Any] = {}
        self.port: int | None = None
        self.uses_defaults = False
        self.insertions: list[Insertion] = []
        self.left_trainable: list[str] | None = None
        self.moved: Moved = {}
        self.removed = False
        self.from_file = False
        self.plan: Any = None
        self._targeting: Targeting | None = None

    @property
    def targeting(self) -> Targeting:
        """The backbone's modules by name."""
        if self._targeting is None:
            self._targeting = self.look_anew()
        return self._targeting

    def look_anew(self) -> Targeting:
        """The backbone's modules by name, as they are now."""
        structure = None if self._targeting is None else self._targeting._structure
        exclude, common = self.base["exclude_modules"], self.base["common_structure"]
        self._targeting = Targeting(self.backbone, common, exclude)
        self._targeting._structure = structure
        return self._targeting

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_targeting": None, "plan": None}  # ids mean nothing to a copy


def record_of(delta: nn.Module) -> Record:
    """The record of a delta."""
    found: Record = delta.__dict__[KEY]
    return found
