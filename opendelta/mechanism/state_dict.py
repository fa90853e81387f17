"""State dicts that hold only what trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from opendelta.backends.bmt import is_distributed
from opendelta.ground.walk import named_tensors


class TrimmedStateDict:
    """State-dict hooks of a module whose ``state_dict()`` is reduced to its active part."""

    def is_trimmed(self) -> bool:
        """Whether it is reduced now."""
        raise NotImplementedError

    def constants(self) -> set[int]:
        """Ids of the tensors that deltas keep constant (buffers, parameters that never train)."""
        raise NotImplementedError

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
    ) -> None:
        """After ``state_dict()``: reduce in place what `module` put into it."""
        if self.is_trimmed():
            keep = active_names(module, self.constants())
            for name, _ in named_tensors(module):
                if name not in keep:
                    state_dict.pop(prefix + name, None)

    def accept(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before ``load_state_dict()``: let a reduced dict stand for itself and what is frozen now.

        What has no values on the meta device stays missing, as anywhere. BMTrain, which takes whole
        values alone, is to load with ``strict=False`` instead.
        """
        if self.is_trimmed():
            keep = active_names(module, self.constants())
            for name, tensor in named_tensors(module):
                if name not in keep and not (tensor.is_meta or is_distributed(tensor)):
                    state_dict.setdefault(prefix + name, tensor.detach())


def active_names(module: nn.Module, constants: set[int]) -> set[str]:
    """Names that a reduced state dict of `module` holds: what trains, and constants of deltas.

    A tensor with several names is held under the first.
    """
    names = {name for name, p in module.named_parameters() if p.requires_grad or id(p) in constants}
    return names | {name for name, b in module.named_buffers() if id(b) in constants}
