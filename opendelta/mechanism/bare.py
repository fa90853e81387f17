"""The tensors of a backbone as they are without its deltas, whose state is not touched for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from opendelta.ground.names import dotted
from opendelta.mechanism.backbone_state import BackboneState, unmerged, unmoved
from opendelta.mechanism.ownership import own_modules
from opendelta.mechanism.slot import ParameterSlot

Slots = dict[int, list[ParameterSlot]]


class Bare(NamedTuple):
    """A parameter or a persistent buffer of the bare backbone."""

    name: str
    tensor: Tensor
    is_buffer: bool


def bare_tensors(backbone: nn.Module) -> Iterator[Bare]:
    """The backbone's own parameters and persistent buffers, tied ones under each of their names.

    What a delta put in the place of a parameter, is merged into or moved comes as it was before.
    """
    slots, originals = slots_of(backbone), unmerged(backbone)
    moved = unmoved(backbone)
    for name, module in own_modules(backbone, remove_duplicate=False, originals=True):
        for own_name, p in bare_parameters(module, slots).items():
            if p is not None:
                yield Bare(dotted(name, own_name), originals.get(id(p), p), False)
        for own_name, buffer in module._buffers.items():
            if buffer is not None and own_name not in module._non_persistent_buffers_set:
                yield Bare(dotted(name, own_name), moved.get(id(buffer), buffer), True)


def bare_parameters(module: nn.Module, slots: Slots) -> dict[str, nn.Parameter | None]:
    """The direct parameters of a module as they are without deltas."""
    parameters = module._parameters
    for slot in slots.get(id(module), ()):
        parameters = dict(parameters)
        original = slot.original if slot.top is not None else parameters.get(slot.name)
        if original is None and not slot.existed[slot.places.index(module)]:
            parameters.pop(slot.name, None)
        else:
            parameters[slot.name] = original
    return parameters


def slots_of(backbone: nn.Module) -> Slots:
    """The places of parameters that deltas replaced, by the id of the module that holds them."""
    slots: Slots = {}
    for state in BackboneState.within(backbone):
        for slot in state.slots.values():
            for place in slot.places:
                slots.setdefault(id(place), []).append(slot)
    return slots
