"""What the library remembers about one backbone, kept in the hooks of its root module.

Nothing is added to the backbone's attributes: a `BackboneState` lives in the root's state-dict
hooks, from where it is copied, pickled and found again together with the backbone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.backends.bmt import is_distributed
from opendelta.backends.quantised import is_offloaded, warn_of_repacking
from opendelta.exceptions import ConfigError, DeltaWarning, InsertionError, warn
from opendelta.ground.names import dotted
from opendelta.ground.walk import every_module, every_parameter, named_tensors
from opendelta.mechanism.dispatch import Dispatcher, forget_compiled_code
from opendelta.mechanism.engines import require_reduced
from opendelta.mechanism.insertion import Insertion, ModuleInsertion, ParameterSlot, switch
from opendelta.mechanism.ownership import own_modules

if TYPE_CHECKING:
    from opendelta.basemodel import DeltaBase
    from opendelta.merging import MergedWeight


# Names of parameters that some freeze left trainable, of backbones whose last delta is gone.
_trained: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class BackboneState:
    """The deltas of a backbone and what must be restored when they go.

    It is itself the state-dict hook of the root: while `trimmed` and any delta is attached,
    ``state_dict()`` holds only what `active_names` says.

    Attributes:
        deltas: the delta objects, in order of insertion.
        was_trainable: ``requires_grad`` of the backbone's parameters before the first freeze.
        trained: names of the backbone's parameters that some freeze left trainable.
        slots: places of parameters that deltas replaced, by name.
        merged: the backbone's parameters that deltas are folded into, by name.
        untied_configs: configs whose ``tie_word_embeddings`` merging set to False.
        trimmed: whether `state_dict()` is reduced to its active part while a delta is attached.
        held: overrides `trimmed` after an attach or detach with ``reset_state_dict=False``.
        probing: whether a pseudo input runs, which is nobody's first forward.
        told_ties: tied names that a freeze has already mentioned.
    """

    def __init__(self) -> None:
        self.deltas: list[DeltaBase] = []
        self.was_trainable: dict[str, bool] = {}
        self.trained: set[str] = set()
        self.slots: dict[str, ParameterSlot] = {}
        self.merged: dict[str, MergedWeight] = {}
        self.untied_configs: list[Any] = []
        self.trimmed = False
        self.held: bool | None = None
        self.told_ties: set[str] = set()
        self.handles: list[RemovableHandle] = []
        self.gradient_handles: list[RemovableHandle] = []
        self.first_forward: RemovableHandle | None = None
        self.first_training: RemovableHandle | None = None
        self.repacking: RemovableHandle | None = None
        self.probing = False

    @classmethod
    def of(cls, backbone: nn.Module) -> BackboneState | None:
        """The state of `backbone`, or None if no delta is on it."""
        for hook in backbone._state_dict_hooks.values():
            if type(hook) is cls:
                return hook
        return None

    @classmethod
    def within(cls, backbone: nn.Module) -> list[BackboneState]:
        """The states of `backbone` and of modules inside it that deltas took as their backbone."""
        hooked = (m for _, m in own_modules(backbone) if m._state_dict_hooks)
        return [state for module in hooked if (state := cls.of(module)) is not None]

    @classmethod
    def create(cls, backbone: nn.Module) -> BackboneState:
        """The state of `backbone`, made and registered if it has none yet."""
        state = cls.of(backbone)
        if state is None:
            state = cls()
            state.trained |= _trained.get(backbone, set())
            state.handles += [
                backbone.register_state_dict_post_hook(state),
                backbone.register_load_state_dict_pre_hook(state.accept_trimmed),
            ]
        return state

    def settle_hooks(self, backbone: nn.Module) -> None:
        """Have the forward hooks of gradient checkpointing, or none if every delta is merged."""
        merged = {id(fold.delta) for weight in self.merged.values() for fold in weight.folds}
        if all(id(delta) in merged for delta in self.deltas):
            self.drop_forward_hooks()
        elif not self.gradient_handles:
            for module in every_module(backbone):
                if "gradient_checkpointing" in module.__dict__ or hasattr(
                    type(module), "gradient_checkpointing"
                ):
                    self.gradient_handles.append(
                        module.register_forward_pre_hook(let_gradients_in, prepend=True)
                    )

    def drop_forward_hooks(self) -> None:
        for handle in (self.first_forward, self.first_training, *self.gradient_handles):
            if handle is not None:
                handle.remove()
        self.first_forward = self.first_training = None
        self.gradient_handles.clear()

    def forget(self, delta: DeltaBase, backbone: nn.Module) -> None:
        """Strike `delta` off; with the last one restore `requires_grad` and take the hooks off."""
        forget_compiled_code()
        self.deltas = [other for other in self.deltas if other is not delta]
        self.slots = {name: slot for name, slot in self.slots.items() if slot.layers}
        self.settle_hooks(backbone)
        if self.deltas:
            return
        for name, p in backbone.named_parameters(remove_duplicate=False):
            if name in self.was_trainable:
                p.requires_grad_(self.was_trainable[name])
        _trained[backbone] = self.trained
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.repacking is not None:
            self.repacking.remove()

    # --- the first forward --------------------------------------------------------------------

    def watch_first_forward(self, backbone: nn.Module) -> None:
        """After the next forward, tell which deltas it never reached."""
        if self.first_forward is None:
            self.first_forward = backbone.register_forward_hook(self.report_unreached)
        if self.repacking is None and any(
            hasattr(p, "quant_state")
            for p in every_parameter(backbone)
            if type(p) is not nn.Parameter
        ):
            self.repacking = backbone.register_forward_pre_hook(warn_of_repacking)

    def report_unreached(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook of the root that acts once, outside of compiled code."""
        if torch.compiler.is_compiling() or self.probing or self.first_forward is None:
            return
        attached = [i for i in self.insertions if i.attached and isinstance(i, ModuleInsertion)]
        self.first_forward.remove()
        self.first_forward = None
        missed = [dotted(i.host_name, i.name) for i in attached if not i.reached]
        if missed:
            shown = ", ".join(missed[:5]) + f" and {len(missed) - 5} more" * (len(missed) > 5)
            warn(
                f"The first forward never called the modules that carry these deltas, so they have "
                f"no effect on it: {shown}. The model may read their weights instead of calling "
                "them, or this input takes another way; leave them out with exclude_modules.",
                DeltaWarning,
            )

    def watch_training(self, backbone: nn.Module) -> None:
        """In the forwards with gradients to come, refuse deltas that would not train."""
        if self.first_training is None:
            self.first_training = backbone.register_forward_hook(self.require_training)

    def require_training(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook of the root that acts, outside of compiled code, until deltas are known to train.

        Raises:
            InsertionError: if DDP does not know a delta, or Accelerate offloaded it.
        """
        if torch.compiler.is_compiling() or self.probing or self.first_training is None:
            return
        if not torch.is_grad_enabled():
            return
        acting = [insertion for insertion in self.insertions if insertion.attached]
        away = [insertion for insertion in acting if _is_offloaded(insertion)]
        if away:
            raise InsertionError(
                f"Accelerate offloaded the delta on {away[0].host_name!r} together with the "
                "backbone, so that it gets no gradients. Offload the backbone first, then "
                "construct or load the delta, which stays where it computes."
            )
        if require_reduced(module, (p for i in acting for _, p in i.named_parameters())):
            handle, self.first_training = self.first_training, None
            handle.remove()

    @property
    def insertions(self) -> Iterator[Insertion]:
        """Every insertion of every delta, in order."""
        return (insertion for delta in self.deltas for insertion in delta.insertions)

    # --- the state dict ---------------------------------------------------------------------

    @property
    def trims(self) -> bool:
        """Whether `state_dict()` is reduced now."""
        if self.held is not None:
            return self.held
        return self.trimmed and any(insertion.attached for insertion in self.insertions)

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
    ) -> None:
        if self.trims:
            trim(module, state_dict, prefix, self.delta_tensors())

    def accept_trimmed(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
    ) -> None:
        """Before loading: let a trimmed dict stand for itself and whatever is frozen now."""
        if self.trims:
            fill_in(module, state_dict, prefix, self.delta_tensors())

    def delta_tensors(self) -> set[int]:
        """Ids of the tensors that deltas keep constant (buffers, parameters that never train)."""
        return {id(t) for delta in self.deltas for t in delta.constants()}


def _is_offloaded(insertion: Insertion) -> bool:
    """Whether Accelerate offloaded what a delta put on, not the backbone below it alone."""
    inserted = getattr(insertion, "module", None)  # a parameter is offloaded with its host
    parts = (insertion.host,) if inserted is None else inserted.modules()
    return any(map(is_offloaded, parts))


def ever_trained(backbone: nn.Module) -> set[str]:
    """Names of the backbone's own parameters that some freeze ever left trainable."""
    names: set[str] = set()
    for place, module in own_modules(backbone):
        state = BackboneState.of(module)
        known = _trained.get(module, set()) if state is None else state.trained
        names.update(dotted(place, name) for name in known)
    return names


def own_parameters(backbone: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The backbone's own parameters with all their names, nothing of any delta.

    A parameter that a delta put in the place of the backbone's (BitFit's bias) is the delta's.
    """
    foreign = {
        id(place._parameters.get(slot.name))
        for state in BackboneState.within(backbone)
        for slot in state.slots.values()
        if slot.top is not None
        for place in slot.places
    }
    for name, module in own_modules(backbone, remove_duplicate=False):
        for own_name, p in module._parameters.items():
            if p is not None and id(p) not in foreign:
                yield dotted(name, own_name), p


def unmerged(backbone: nn.Module) -> dict[int, Tensor]:
    """Id of each parameter that deltas are merged into -> what is there without them."""
    return {
        id(weight.parameter): weight.bare
        for state in BackboneState.within(backbone)
        for weight in state.merged.values()
    }


def active_names(module: nn.Module, constants: set[int]) -> set[str]:
    """Names that a trimmed state dict of `module` holds: what trains, and constants of deltas.

    A tensor with several names is held under the first.
    """
    names = {name for name, p in module.named_parameters() if p.requires_grad or id(p) in constants}
    return names | {name for name, b in module.named_buffers() if id(b) in constants}


def trim(module: nn.Module, state_dict: dict[str, Any], prefix: str, constants: set[int]) -> None:
    """Reduce in place what `module` put into `state_dict` to its active part."""
    keep = active_names(module, constants)
    for name, _ in named_tensors(module):
        if name not in keep:
            state_dict.pop(prefix + name, None)


def fill_in(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, constants: set[int]
) -> None:
    """Add to a dict to be loaded what a trimmed one leaves out, with the values there are now.

    What has no values on the meta device stays missing, as anywhere. BMTrain, which takes whole
    values alone, is to load with ``strict=False`` instead.
    """
    keep = active_names(module, constants)
    for name, tensor in named_tensors(module):
        if name not in keep and not (tensor.is_meta or is_distributed(tensor)):
            state_dict.setdefault(prefix + name, tensor.detach())


class SubmoduleTrim:
    """State-dict hooks of a submodule whose own `state_dict()` was asked to be trimmed."""

    def __init__(self, state: BackboneState) -> None:
        self.state = state

    def register(self, module: nn.Module) -> None:
        self.state.handles += [
            module.register_state_dict_post_hook(self),
            module.register_load_state_dict_pre_hook(self.accept_trimmed),
        ]

    @property
    def trims(self) -> bool:
        return any(insertion.attached for insertion in self.state.insertions)

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
    ) -> None:
        if self.trims:
            trim(module, state_dict, prefix, self.state.delta_tensors())

    def accept_trimmed(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
    ) -> None:
        if self.trims:
            fill_in(module, state_dict, prefix, self.state.delta_tensors())


def let_gradients_in(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before a block under reentrant checkpointing: make an input require grad.

    Reentrant checkpointing drops all gradients of a block none of whose inputs requires grad;
    with a frozen backbone that is the first block of every stack.
    """
    if not (module.training and getattr(module, "gradient_checkpointing", False)):
        return None
    function = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(function, "keywords", {}).get("use_reentrant", False):
        return None
    if not torch.is_grad_enabled() or any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return None
    if not any(p.requires_grad for p in module.parameters()) and Dispatcher.router is None:
        return None  # in a route what trains need not be attached
    for position, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:position], value.detach().requires_grad_(), *args[position + 1 :])
    return None


@contextmanager
def probing(backbone: nn.Module) -> Iterator[None]:
    """While a pseudo input runs: what it reaches, or does not, tells nothing of a real forward."""
    states = BackboneState.within(backbone)
    insertions = [i for state in states for i in state.insertions if isinstance(i, ModuleInsertion)]
    dispatchers = [d for i in insertions if (d := i.side.on(i.host)) is not None]
    fired = [dispatcher.fired for dispatcher in dispatchers]
    for state in states:
        state.probing = True
    try:
        yield
    finally:
        for state in states:
            state.probing = False
        for dispatcher, was in zip(dispatchers, fired, strict=True):
            dispatcher.fired = was


@contextmanager
def bare(backbone: nn.Module) -> Iterator[nn.Module]:
    """The backbone without any of its deltas, for the time of a ``with`` block."""
    states = BackboneState.within(backbone)
    attached = [i for state in states for i in state.insertions if i.attached]
    trimmed = [(state, state.trimmed) for state in states]
    switch(reversed(attached), False)
    for state in states:
        state.trimmed = False
    try:
        yield backbone
    finally:
        switch(attached, True)
        for state, was in trimmed:
            state.trimmed = was


def deltas(backbone: nn.Module) -> list[DeltaBase]:
    """The deltas of a backbone in order of insertion, attached or not.

    Works on a backbone, on a module that wraps one, and on deep copies and unpickled backbones,
    whose delta objects are their own.

    Example:
        >>> [delta.delta_type for delta in opendelta.deltas(model)]
        ['lora', 'adapter']
    """
    if not isinstance(backbone, nn.Module):
        raise ConfigError(f"deltas() takes a torch nn.Module, not a {type(backbone).__name__}.")
    return [delta for state in BackboneState.within(backbone) for delta in state.deltas]
