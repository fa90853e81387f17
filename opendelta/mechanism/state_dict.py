"""State dicts that hold only what trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opendelta.backends.bmt import is_distributed
from opendelta.ground.walk import named_tensors


class TrimmedStateDict:
    """State-dict hooks of a module whose ``state_dict()`` is reduced to its active part."""

    def is_trimmed(self) -> bool:
        """Whether it is reduced now."""
        raise NotImplementedError

    def constants(self) -> set[int]:
        """Ids of what else is held: constants of deltas, and the buffers that they moved."""
        raise NotImplementedError

    def own_buffers(self) -> dict[int, Tensor | None]:
        """Id of each buffer that deltas moved, which is held too -> what it is without them."""
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
            keep, own = active_names(module, self.constants()), self.own_buffers()
            moved = {name: own[id(b)] for name, b in module.named_buffers() if id(b) in own}
            if all(prefix + name in state_dict for name in keep.difference(moved)):
                for name, value in moved.items():  # not moved yet when that dict was made
                    if value is not None:
                        state_dict.setdefault(prefix + name, value)
            for name, tensor in named_tensors(module):
                held = name in keep and name not in moved
                if not (held or tensor.is_meta or is_distributed(tensor)):
                    state_dict.setdefault(prefix + name, tensor.detach())


def active_names(module: nn.Module, constants: set[int]) -> set[str]:
    """Names that a reduced state dict of `module` holds: what trains, and constants of deltas.

    A tensor with several names is held under the first.
    """
    names = {name for name, p in module.named_parameters() if p.requires_grad or id(p) in constants}
    return names | {name for name, b in module.named_buffers() if id(b) in constants}
