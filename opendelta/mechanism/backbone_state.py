"""What the library remembers about one backbone, kept in the hooks of its root module.

Nothing is added to the backbone's attributes: a `BackboneState` lives in the root's state-dict
hooks, from where it is copied, pickled and found again together with the backbone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.backends.quantised import may_repack, warn_of_repacking
from opendelta.exceptions import ConfigError, InsertionError
from opendelta.ground.blocks import undone
from opendelta.ground.containers import Args, Kwargs
from opendelta.ground.names import dotted
from opendelta.ground.seams import forget_compiled_code, runs_backward
from opendelta.mechanism import calls, recomputed, watch
from opendelta.mechanism.buffers import Buffers, Moved
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.child_slot import ChildSlot
from opendelta.mechanism.dispatch import Dispatcher
from opendelta.mechanism.hooks import add_forward_hook, add_state_dict_hooks, take_off
from opendelta.mechanism.hosts import require_hosts
from opendelta.mechanism.insertion import Insertion, switch
from opendelta.mechanism.merged_weight import MergedHost
from opendelta.mechanism.ownership import own_modules
from opendelta.mechanism.slot import ParameterSlot
from opendelta.mechanism.state_dict import TrimmedStateDict

# Names of parameters that some freeze left trainable, of backbones whose last delta is gone.
_trained: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class BackboneState(TrimmedStateDict):
    """The deltas of a backbone and what must be restored when they go.

    It is itself the state-dict hook of the root: while `trimmed` and any delta is attached,
    ``state_dict()`` holds only what trains.

    Attributes:
        deltas: the delta objects, in order of insertion.
        was_trainable: ``requires_grad`` of the backbone's parameters before the first freeze.
        trained: names of the backbone's parameters that some freeze left trainable.
        slots: places of parameters that deltas replaced, by name; `child_slots`: of modules.
        merged: the modules of the backbone that deltas are folded into, by name.
        buffers: whose values stand in the backbone's persistent buffers.
        untied_configs: configs whose ``tie_word_embeddings`` merging set to False.
        trimmed: whether `state_dict()` is reduced to its active part while a delta is attached.
        held: overrides `trimmed` after an attach or detach with ``reset_state_dict=False``.
        told_ties: tied names that a freeze has already mentioned.
        is_untrained: whether no forward in training has run with a delta yet.
        is_new: whether the next forward asks whether the deltas' modules are still there.
        unheard: in how many forwards to look for deltas that are never reached, the last of them
            in evaluation.
        is_unsettled: whether forwards with gradients still look for deltas that would not train.
        repacks: whether 4-bit weights may be repacked under a training model.
        blank: insertions that came without values, on a backbone on the meta device.
        given: names that state dicts have given values to since.
        probing: whether a pseudo input runs, which is nobody's first forward.
    """

    def __init__(self) -> None:
        self.deltas: list[Any] = []
        self.was_trainable: dict[str, bool] = {}
        self.trained: set[str] = set()
        self.slots: dict[str, ParameterSlot] = {}
        self.child_slots: dict[str, ChildSlot] = {}
        self.merged: dict[str, MergedHost] = {}
        self.buffers = Buffers()
        self.untied_configs: list[Any] = []
        self.trimmed = False
        self.held: bool | None = None
        self.told_ties: set[str] = set()
        self.is_untrained = True
        self.is_new = self.is_unsettled = self.repacks = self.probing = False
        self.unheard = 0
        self.blank: list[Insertion] = []
        self.given: set[str] = set()
        self._acting: tuple[object, dict[Insertion, str]] = None, {}
        self.handles: list[RemovableHandle] = []
        self.watching: list[RemovableHandle] = []

    @classmethod
    def of(cls, backbone: nn.Module, changes: Changes | None = None) -> BackboneState | None:
        """The state that `backbone` has, or is about to have; None if no delta is on it."""
        hooks: Any = backbone._state_dict_hooks
        for hook in (hooks if changes is None else changes.of(hooks)).values():
            if type(hook) is cls:
                return hook
        return None

    @classmethod
    def within(cls, backbone: nn.Module) -> list[BackboneState]:
        """The states of `backbone` and of modules inside it that deltas took as their backbone."""
        hooked = (m for _, m in own_modules(backbone) if m._state_dict_hooks)
        return [state for module in hooked if (state := cls.of(module)) is not None]

    @classmethod
    def create(cls, backbone: nn.Module, changes: Changes) -> BackboneState:
        """The state of `backbone`, made if it has none yet."""
        state = cls.of(backbone, changes)
        if state is None:
            state = cls()
            state.trained |= _trained.get(backbone, set())
            state.handles = add_state_dict_hooks(changes, backbone, state, state.accept)
        return state

    @property
    def insertions(self) -> Iterator[Insertion]:
        """Every insertion of every delta, in order."""
        return (insertion for delta in self.deltas for insertion in delta.insertions)

    # --- who is listed ----------------------------------------------------------------------

    def enlist(
        self,
        changes: Changes,
        delta: Any,
        moved: Moved,
        backbone: nn.Module,
        new: Iterable[Insertion],
    ) -> None:
        """List a delta with what is `new` of it, and watch the forwards to come.

        Args:
            changes: what it comes in with.
            delta: the delta; `moved`: the buffers that it moved.
            backbone: the root.
            new: what it brings.
        """
        if blank := watch.without_values(new):
            changes.set(self, blank=[*self.blank, *blank])
        listed = changes.get(self, "deltas")
        if not any(other is delta for other in listed):
            changes.set(self, deltas=[*listed, delta])
        changes.set(self, is_new=True, unheard=watch.PATIENCE, is_unsettled=True)
        self.buffers.enlist(changes, delta, moved, backbone)
        self.settle_hooks(changes, backbone)

    def forget(self, changes: Changes, delta: Any, backbone: nn.Module) -> None:
        """Strike `delta` off; with the last one restore `requires_grad` and take the hooks off."""
        changes.do_first(forget_compiled_code)
        self.buffers.forget(changes, delta)
        left = [other for other in self.deltas if other is not delta]
        slots = {n: s for n, s in self.slots.items() if changes.get(s, "layers")}
        child_slots = {n: s for n, s in self.child_slots.items() if changes.get(s, "layers")}
        changes.set(self, deltas=left, slots=slots, child_slots=child_slots)
        self.settle_hooks(changes, backbone)
        if left:
            return
        for name, p in own_parameters(backbone):
            if name in self.was_trainable:
                changes.do(p.requires_grad_, self.was_trainable[name])
        for slot in self.slots.values():
            name = slot.layers[0].full_name if slot.layers else ""
            if slot.original is not None and name in self.was_trainable:
                changes.do(slot.original.requires_grad_, self.was_trainable[name])
        changes.do_first(_trained.__setitem__, backbone, self.trained)
        for handle in self.handles:
            take_off(changes, handle)

    def settle_hooks(self, changes: Changes, backbone: nn.Module) -> None:
        """Have the forward hooks of the root and of checkpointed blocks while a delta may act."""
        folds = (f for h in changes.of(self.merged).values() for f in changes.get(h, "folds"))
        merged = {id(fold.delta) for fold in folds}
        acts = any(id(delta) not in merged for delta in changes.get(self, "deltas"))
        known = changes.get(self, "watching")
        if not acts:
            for handle in known:
                take_off(changes, handle)
            changes.set(self, watching=[])
        elif not known:
            made = [
                add_forward_hook(changes, backbone, self.after, always_call=True, with_kwargs=True)
            ]
            for block in watch.checkpointed_blocks(backbone):
                let_in = watch.let_gradients_in
                made.append(add_forward_hook(changes, block, let_in, before=True, first=True))
            made.insert(
                0,
                add_forward_hook(
                    changes, backbone, self.before, before=True, first=True, with_kwargs=True
                ),
            )
            changes.set(self, watching=made)
        else:  # what the user passed is seen before a soft prompt changes it
            table: Any = changes.of(backbone._forward_pre_hooks)
            if known[0].id in table:
                table.move_to_end(known[0].id, last=False)

    # --- while it runs ----------------------------------------------------------------------

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Hook before the root."""
        if self.blank:
            self.require_values(module)
        if torch.compiler.is_compiling():
            return
        if self.is_new and not self.probing:
            acting = [insertion for insertion in self.insertions if insertion.attached]
            require_hosts(self.deltas[0].backbone_model, acting)  # not on a replica
            self.is_new, self.repacks = False, may_repack(module)
        calls.begin(module, args, kwargs)
        if runs_backward() or (module.training and not torch.is_grad_enabled()):
            recomputed.note_or_compare(self, partial(self.standing, module))
        if self.repacks:
            warn_of_repacking(module)

    def require_values(self, backbone: nn.Module) -> None:
        """Refuse to run, or to merge, what has no values, see `watch.require_values`."""
        self.blank = watch.require_values(backbone, self.blank, self.given)

    def accept(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before ``load_state_dict()``, see `TrimmedStateDict`; note what gets values."""
        if self.blank:
            names = (name for i in self.blank for name, _ in i.named_parameters())
            self.given |= {name for name in names if prefix + name in state_dict}
        super().accept(module, state_dict, prefix)

    def after(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """Hook after the root, also after an error."""
        if torch.compiler.is_compiling():
            if module.training and any(delta.adds_to_loss for delta in self.deltas):
                raise InsertionError(
                    "A delta on this backbone adds a term to its loss, which compiled code leaves "
                    "out: compile the parts inside, or add delta.loss_term() by hand."
                )
            return None
        nodes = calls.end(module, output)
        if nodes:
            recomputed.guard(nodes, partial(self.standing, module))
        if self.probing or output is None:
            return None
        if self.unheard > int(module.training):
            self.unheard = watch.report_unreached(self.insertions, module.training, self.unheard)
        if torch.is_grad_enabled():
            if self.is_unsettled:
                self.is_unsettled = not watch.require_training(module, self.insertions)
            if module.training:
                route = None if Dispatcher.router is None else Dispatcher.router(module)
                for delta in self.deltas if route is None else dict.fromkeys(route.deltas):
                    if delta is None or (route is None and not delta.is_attached):
                        continue
                    if self.is_untrained:
                        self.is_untrained = False
                        if not self.was_trainable:  # else that is what freeze_module left
                            watch.report_unfrozen(module, (p for _, p in own_parameters(module)))
                    term = delta.loss_term() if delta.adds_to_loss else None
                    if term is not None:
                        output = watch.add_to_loss(module, kwargs, output, term)
                return output
        return None

    def standing(self, root: nn.Module) -> recomputed.Standing:
        """What acts on the backbone now, for this thread."""
        since, acting = self._acting
        if since is not Changes.latest:
            since = Changes.latest
            acting = {i: recomputed.ATTACHED for i in self.insertions if i.attached}
            folds = (fold for host in self.merged.values() for fold in host.folds)
            acting |= {fold.insertion: recomputed.MERGED for fold in folds}
            self._acting = since, acting
        route = None if Dispatcher.router is None else Dispatcher.router(root)
        return recomputed.Standing(acting, None if route is None else route.deltas)

    # --- the state dict ---------------------------------------------------------------------

    def is_trimmed(self) -> bool:
        if self.held is not None:
            return self.held
        return self.trimmed and any(insertion.attached for insertion in self.insertions)

    def constants(self) -> set[int]:
        constants = (tensor for insertion in self.insertions for tensor in insertion.constants())
        return {*map(id, constants), *self.own_buffers()}

    def own_buffers(self) -> dict[int, Tensor | None]:
        return self.buffers.own_now()


class SubmoduleTrim(TrimmedStateDict):
    """State-dict hooks of a submodule whose own `state_dict()` was asked to be trimmed."""

    def __init__(self, state: BackboneState) -> None:
        self.state = state
        self.constants = state.constants  # type: ignore[method-assign]
        self.own_buffers = state.own_buffers  # type: ignore[method-assign]

    def is_trimmed(self) -> bool:
        return any(insertion.attached for insertion in self.state.insertions)


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
    for name, module in own_modules(backbone, remove_duplicate=False, originals=True):
        for own_name, p in module._parameters.items():
            if p is not None and id(p) not in foreign:
                yield dotted(name, own_name), p


def unmerged(backbone: nn.Module) -> dict[int, Tensor]:
    """Id of each parameter that deltas are merged into -> what is there without them."""
    return {
        id(weight.parameter): weight.bare
        for state in BackboneState.within(backbone)
        for host in state.merged.values()
        for weight in host.weights.values()
    }


def unmoved(backbone: nn.Module) -> dict[int, Tensor]:
    """Id of each buffer that deltas moved -> what is there without them."""
    return {
        key: own
        for state in BackboneState.within(backbone)
        for key, own in state.own_buffers().items()
        if own is not None
    }


@contextmanager
def probing(backbone: nn.Module) -> Iterator[None]:
    """While a pseudo input runs, which is nobody's first forward."""
    states = BackboneState.within(backbone)
    dispatchers = [i.dispatcher for state in states for i in state.insertions]
    fired = [(dispatcher, dispatcher.fired) for dispatcher in dispatchers if dispatcher]

    def put_back() -> None:
        for state in states:
            state.probing = False
        for dispatcher, was in fired:
            dispatcher.fired = was

    with undone(put_back):
        for state in states:
            state.probing = True
        yield


@contextmanager
def bare(backbone: nn.Module) -> Iterator[nn.Module]:
    """The backbone without any of its deltas, for the time of a ``with`` block."""
    states = BackboneState.within(backbone)
    attached = [i for state in states for i in state.insertions if i.attached]
    there = [(s, [d for d in s.deltas if any(i.attached for i in d.insertions)]) for s in states]
    trimmed = [(state, state.trimmed) for state in states]

    def put_back() -> None:
        changes = Changes()
        switch(changes, attached, True)
        for state, were in there:
            state.buffers.settle(changes, on=were)
        for state, was in trimmed:
            changes.set(state, trimmed=was)
        changes.carry_out()

    with undone(put_back):
        changes = Changes()
        switch(changes, reversed(attached), False)
        for state, were in there:
            state.buffers.settle(changes, off=were)
        for state in states:
            changes.set(state, trimmed=False)
        changes.carry_out()
        yield backbone


def deltas(backbone: nn.Module) -> list[Any]:
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
