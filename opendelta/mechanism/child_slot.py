"""A module of a delta in the place of one of the backbone's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from opendelta.exceptions import InsertionError
from opendelta.ground.names import dotted
from opendelta.ground.seams import forget_compiled_code
from opendelta.ground.walk import every_module
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.insertion import Insertion, WithModule, acts_on_whole_batches
from opendelta.mechanism.ownership import STANDS_FOR
from opendelta.mechanism.places import Place, follow, place_of


class ChildSlot:
    """A place for a child: in it stands the backbone's own module or one of those laid over it.

    It is that of the attached insertion that was inserted last, else the original one.

    Args:
        parent: the module whose child it is; `name`: the child's name there.

    Attributes:
        original: the backbone's own module.
        layers: the insertions that may stand here, in order.
        held_bare: by how many routes the original is held in its place.
    """

    def __init__(self, parent: nn.Module, name: str) -> None:
        original = parent._modules[name]
        assert original is not None
        self.parent, self.name, self.original = parent, name, original
        self.layers: list[Replacement] = []
        self.held_bare = 0
        self.left_at: Place | None = None  # where the original was set aside

    @property
    def top(self) -> Replacement | None:
        """The insertion whose module is in place."""
        if self.held_bare:
            return None
        return next((layer for layer in reversed(self.layers) if layer.is_on), None)

    def change(self, changes: Changes, owner: Any, **values: Any) -> None:
        """Change what says which module acts, and put that one in place."""
        before = self._acting(changes)
        changes.set(owner, **values)
        after = self._acting(changes)
        children = changes.of(self.parent._modules)
        outgoing = children[self.name]
        incoming = changes.get(self, "original") if after is None else after.module
        if outgoing is incoming or outgoing is None:
            return
        now = place_of(outgoing)
        new = follow(incoming.parameters(), changes.get(after or self, "left_at"), now)
        if new is not None:
            incoming.to(device=new[0], dtype=new[1])
        if incoming.training != outgoing.training:
            incoming.train(outgoing.training)
        changes.set(before or self, left_at=now)
        children[self.name] = incoming
        changes.do_first(forget_compiled_code)

    def hold_bare(self, changes: Changes, more: int) -> None:
        """Let one route more (1) or less (-1) hold the original in its place."""
        self.change(changes, self, held_bare=changes.get(self, "held_bare") + more)

    def _acting(self, changes: Changes) -> Replacement | None:
        on = [layer for layer in changes.get(self, "layers") if changes.get(layer, "is_on")]
        return on[-1] if on and not changes.get(self, "held_bare") else None


class Replacement(WithModule):
    """A child swapped for a module of a delta; detaching puts the original back.

    Args:
        slot: the child's place; `host_name`: the name of its parent in the backbone.
        module: what stands there while attached.
    """

    def __init__(self, slot: ChildSlot, host_name: str, module: nn.Module) -> None:
        super().__init__(slot.parent, host_name, slot.name, module)
        self.child_slot, self.is_on = slot, False

    @property
    def place_name(self) -> str:
        return dotted(self.host_name, self.name)

    @property
    def brought(self) -> list[nn.Module]:
        return [self.module]

    @property
    def led_by(self) -> nn.Module:
        return self.child_slot.original

    @property
    def attached(self) -> bool:
        return self.is_on

    def misfit(self) -> str | None:
        there = self.child_slot.parent._modules.get(self.name)
        stands = self.child_slot.top is self
        if stands and not any(part is self.module for part in every_module(there or nn.Module())):
            return f"a {type(there).__name__} was put in the place of the delta's own module"
        return None

    def enter(self, changes: Changes, later: Iterable[Insertion] = ()) -> None:
        changes.set(self.module, **{STANDS_FOR: [self.child_slot.original]})
        changes.set(self.child_slot, layers=[*changes.get(self.child_slot, "layers"), self])
        self.attach(changes)

    def attach(self, changes: Changes) -> None:
        self.child_slot.change(changes, self, is_on=True)

    def detach(self, changes: Changes) -> None:
        self.child_slot.change(changes, self, is_on=False)

    def leave(self, changes: Changes) -> None:
        self.detach(changes)
        left = [layer for layer in changes.get(self.child_slot, "layers") if layer is not self]
        changes.set(self.child_slot, layers=left)

    def sites(self, is_called: Callable[[nn.Module], bool]) -> list[nn.Module] | None:
        raise acts_on_whole_batches(self)


class OwnModule(Replacement):
    """A module of the backbone of which a delta has one of its own."""

    of_method = False
    is_named_as_own = True

    @property
    def folds(self) -> bool:
        return False  # it costs nothing where it stands

    def step_aside(self, changes: Changes) -> None:
        """It stays."""

    def step_back(self, changes: Changes, later: Iterable[Insertion]) -> None:
        """It has stayed."""

    def keep(self, changes: Changes) -> None:
        slot = self.child_slot
        left = [layer for layer in changes.get(slot, "layers") if layer is not self]
        changes.set(slot, layers=left, original=self.module)
        for layer in left:
            changes.set(layer.module, **{STANDS_FOR: [self.module]})
        changes.of(self.module.__dict__).pop(STANDS_FOR)
        for p in self.module.parameters():
            changes.do(p.__dict__.pop, "_is_delta", None)

    def stand_in(self, place: nn.Module) -> nn.Module:
        """What computes in the stead of `place`, the backbone's own module."""
        return self.module

    def sites(self, is_called: Callable[[nn.Module], bool]) -> list[nn.Module]:
        original = self.child_slot.original
        if not is_called(original):
            raise InsertionError(
                f"{self.place_name!r} is read by its parent, never called, so a module of this "
                "delta's own cannot act there row by row: run the rows apart."
            )
        return [original]
