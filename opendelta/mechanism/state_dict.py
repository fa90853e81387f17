"""State dicts that hold only what trains."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from opendelta.backends.bmt import is_distributed
from opendelta.exceptions import DeltaWarning, warn
from opendelta.ground.seams import is_for_a_model_folder, names_in_model
from opendelta.ground.walk import named_tensors

_told: WeakSet[nn.Module] = WeakSet()  # of whose folders it was said that they are no models'


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
            left_out = [name for name, _ in named_tensors(module) if name not in keep]
            for name in left_out:
                state_dict.pop(prefix + name, None)
            if left_out and module not in _told and is_for_a_model_folder():
                _told.add(module)
                _warn_of_folder(module, len(keep), len(left_out))

    def accept(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before ``load_state_dict()``: let a reduced dict stand for itself and what is frozen now.

        What has no values on the meta device stays missing, as anywhere. BMTrain, which takes whole
        values alone, is to load with ``strict=False`` instead. The older names in files of
        ``save_pretrained``, from which a Trainer resumes, are known.
        """
        if self.is_trimmed():
            keep, own = active_names(module, self.constants()), self.own_buffers()
            tensors = dict(named_tensors(module))
            given = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
            if unknown := [name for name in given if name not in tensors]:
                for saved, name in names_in_model(module, unknown).items():
                    if name in tensors:
                        state_dict.setdefault(prefix + name, state_dict.pop(prefix + saved))
            moved = {name: own[id(b)] for name, b in module.named_buffers() if id(b) in own}
            if all(prefix + name in state_dict for name in keep.difference(moved)):
                for name, value in moved.items():  # not moved yet when that dict was made
                    if value is not None:
                        state_dict.setdefault(prefix + name, value)
            for name, tensor in tensors.items():
                held = name in keep and name not in moved
                if not (held or tensor.is_meta or is_distributed(tensor)):
                    state_dict.setdefault(prefix + name, tensor.detach())


class WholePart:
    """State-dict hooks of a model inside a backbone that is reduced: a wrapper saves it by itself.

    Args:
        whole: the hooks of the backbone.
    """

    def __init__(self, whole: TrimmedStateDict) -> None:
        self.whole = whole

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        """After ``state_dict()``: tell that a folder of a model is made of the bare one."""
        if self.whole.is_trimmed() and module not in _told and is_for_a_model_folder():
            _told.add(module)
            warn(
                f"What is saved here is the bare {type(module).__name__}, with tensors of deltas "
                "that from_pretrained leaves out: it would be loaded untuned. The delta alone is "
                "saved by delta.save_finetuned(folder); a whole model is written after "
                "delta.merge(). This is said once.",
                DeltaWarning,
            )

    def accept(self, *_: Any) -> None:
        """Before ``load_state_dict()``: nothing is left out."""


def models_inside(backbone: nn.Module) -> list[nn.Module]:
    """The outermost models of transformers in a backbone that is none itself."""
    found: list[nn.Module] = []
    waiting = [backbone]
    while waiting:
        module = waiting.pop()
        if hasattr(module, "save_pretrained") and hasattr(module, "main_input_name"):
            found.append(module)
        else:
            waiting += module.children()
    return [module for module in found if module is not backbone]


def _warn_of_folder(module: nn.Module, kept: int, left_out: int) -> None:
    warn(
        f"What is saved here is not the whole {type(module).__name__}: {kept} tensors, those that "
        f"train, without the {left_out} that are frozen. from_pretrained would make those up at "
        "random; only a Trainer that resumes has them at hand. The delta alone is saved by "
        "delta.save_finetuned(folder). A whole model is written after delta.merge(); where the "
        "method has no merging, `with delta.detached: model.save_pretrained(folder)` writes the "
        "backbone, beside which the delta is saved. This is said once.",
        DeltaWarning,
    )


def active_names(module: nn.Module, constants: set[int]) -> set[str]:
    """Names that a reduced state dict of `module` holds: what trains, and constants of deltas.

    A tensor with several names is held under the first.
    """
    names = {name for name, p in module.named_parameters() if p.requires_grad or id(p) in constants}
    return names | {name for name, b in module.named_buffers() if id(b) in constants}
