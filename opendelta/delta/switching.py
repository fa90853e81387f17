"""On and off: what stands before every verb on a delta, attaching, detaching, taking off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from opendelta.backends.sharding import reshard
from opendelta.delta.delta import Delta
from opendelta.delta.record import record_of
from opendelta.exceptions import InsertionError
from opendelta.ground.blocks import undone
from opendelta.ground.walk import uncompiled
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.changes import Changes, one_at_a_time
from opendelta.mechanism.engines import join_engine
from opendelta.mechanism.hosts import require_hosts
from opendelta.mechanism.insertion import Insertion, switch


def is_merged(delta: Delta) -> bool:
    """Whether a delta is folded into the backbone's weights."""
    state = BackboneState.of(delta.backbone_model)
    hosts = () if state is None else state.merged.values()
    return any(fold.delta is delta for host in hosts for fold in host.folds)


def is_attached(delta: Delta) -> bool:
    """Whether any part of a delta is attached; a merged one is not, though it acts."""
    return any(insertion.attached for insertion in delta.insertions) and not is_merged(delta)


@contextmanager
def acting(
    delta: Delta, merged: bool | None = False, changes: Changes | None = None
) -> Iterator[tuple[BackboneState, Changes]]:
    """What stands before every verb: is the delta there, merged or not, and are shards put back.

    Args:
        delta: which delta.
        merged: whether it has to be; None if either will do.
        changes: what the verb's changes come in with; None for changes of its own, which come in
            at the end of the block.

    Yields:
        The state of the backbone, and the changes to be prepared.

    Raises:
        InsertionError: if the delta was removed, or is merged and should not be, or the reverse.
    """
    if record_of(delta).removed:
        raise InsertionError(
            f"This {type(delta).__name__} was removed from its backbone: construct a new one."
        )
    if merged is not None and is_merged(delta) != merged:
        raise InsertionError(
            f"This {type(delta).__name__} is not merged."
            if merged
            else f"This {type(delta).__name__} is merged into its backbone's weights: unmerge() it "
            "first."
        )
    reshard(delta.backbone_model)
    prepared = Changes() if changes is None else changes
    with one_at_a_time():
        yield BackboneState.create(delta.backbone_model, prepared), prepared
        if changes is None:
            prepared.carry_out()


def attach(delta: Delta, module: nn.Module | None = None, follow: bool = True) -> None:
    """Let a delta act, see `DeltaBase.attach`."""
    with acting(delta) as (state, changes):
        insertions = inside(delta, module)
        require_hosts(delta.backbone_model, insertions, changes)
        _put_on(delta, insertions, state, changes)
        changes.set(state, held=None if follow else state.is_trimmed())


def detach(delta: Delta, module: nn.Module | None = None, follow: bool = True) -> None:
    """Let a delta act no longer, see `DeltaBase.detach`."""
    with acting(delta) as (state, changes):
        _take_away(delta, inside(delta, module), state, changes)
        changes.set(state, held=None if follow else state.is_trimmed())


def take_off(delta: Delta, changes: Changes) -> None:
    """Prepare to take an unmerged delta off for good."""
    with acting(delta, None, changes) as (state, _):
        for insertion in reversed(delta.insertions):
            insertion.leave(changes)
        state.forget(changes, delta, delta.backbone_model)
        changes.set(state, held=None)
        changes.set(record_of(delta), removed=True)


def _put_on(
    delta: Delta, insertions: Sequence[Insertion], state: BackboneState, changes: Changes
) -> None:
    """Let insertions act again, on whichever engine the backbone has got meanwhile."""
    join_engine(delta.backbone_model, insertions)
    switch(changes, insertions, True)
    state.buffers.settle(changes, on=[delta] if insertions else ())
    changes.set(state, is_unsettled=True)


def _take_away(
    delta: Delta, insertions: Sequence[Insertion], state: BackboneState, changes: Changes
) -> None:
    """Let insertions act no longer."""
    switch(changes, reversed(insertions), False)
    gone = {id(insertion) for insertion in insertions}
    acts = any(insertion.attached for insertion in delta.insertions if id(insertion) not in gone)
    state.buffers.settle(changes, off=() if acts else [delta])


def inside(delta: Delta, module: nn.Module | None) -> list[Insertion]:
    """The insertions of a delta in a module, with what shares a module with them.

    Raises:
        InsertionError: if there are none.
    """
    if module is None or uncompiled(module) is delta.backbone_model:
        return delta.insertions
    name = record_of(delta).targeting.name_of(module)
    here = [i for i in delta.insertions if (i.host_name + ".").startswith(name + ".")]
    brought = {id(i.module) for i in here if i.module is not None}
    here = [i for i in delta.insertions if i in here or id(i.module) in brought]
    if not here:
        raise InsertionError(f"No part of this {type(delta).__name__} sits inside {name!r}.")
    return here


class Switch:
    """`delta.attached` and `delta.detached`: a yes or no, and a ``with`` block.

    Args:
        delta: which delta; `on`: what is asked, or to hold within the block.
    """

    def __init__(self, delta: Delta, on: bool) -> None:
        self.delta, self.on = delta, on

    def __bool__(self) -> bool:
        on = is_attached(self.delta)
        return on if self.on else not (on or is_merged(self.delta))

    def __eq__(self, other: object) -> bool:
        return bool(self) == other if isinstance(other, (bool, Switch)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(bool(self))

    def __call__(self) -> Switch:
        """Itself: ``with delta.detached():`` and ``with delta.detached:`` are the same."""
        return self

    def __enter__(self) -> None:
        self._block = _held(self.delta, self.on)
        self._block.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)


@contextmanager
def _held(delta: Delta, on: bool) -> Iterator[None]:
    """Within the block a delta acts wholly (`on`), or not at all; then it does as before."""
    turned = [insertion for insertion in delta.insertions if insertion.attached != on]

    def put_back() -> None:
        if record_of(delta).removed or is_merged(delta):
            return
        with acting(delta) as (state, changes):
            if on:
                _take_away(delta, turned, state, changes)
            else:
                _put_on(delta, turned, state, changes)

    with undone(put_back):
        if on:
            attach(delta)
        else:
            detach(delta)
        yield
