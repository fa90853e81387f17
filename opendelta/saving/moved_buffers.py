"""The persistent buffers that training moved, as a part of what is saved and loaded."""

from __future__ import annotations

from torch import Tensor

from opendelta.delta.delta import Delta
from opendelta.delta.record import record_of
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.buffers import persistent_buffers
from opendelta.mechanism.changes import Changes, one_at_a_time


def moved_buffers(delta: Delta) -> dict[str, Tensor]:
    """Name in the backbone -> value, of the buffers that a delta's training has moved so far."""
    backbone = delta.backbone_model
    state = BackboneState.of(backbone)
    if state is not None:
        with one_at_a_time():
            changes = Changes()
            state.buffers.note(changes, backbone)
            state.buffers.settle(changes)
            changes.carry_out()
    return dict(record_of(delta).moved)


def buffer_targets(delta: Delta) -> dict[str, Tensor]:
    """The buffers of a delta's backbone that a file may hold, under all their names."""
    places = persistent_buffers(delta.backbone_model, remove_duplicate=False)
    found = ((name, module._buffers[key]) for name, (module, key) in places)
    return {name: buffer for name, buffer in found if buffer is not None}


def load_buffers(delta: Delta, values: dict[str, Tensor], changes: Changes) -> None:
    """Prepare that `values` are what a delta has moved, in place while it acts."""
    backbone, every = delta.backbone_model, buffer_targets(delta)
    first = {id(every[name]): name for name, _ in persistent_buffers(backbone)}
    named = {first[id(every[name])]: value for name, value in values.items()}
    BackboneState.create(backbone, changes).buffers.load(changes, delta, named)
