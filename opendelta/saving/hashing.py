"""Fingerprints of backbones: md5 over a model's structure and parameters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.backends.quantised import has_repacked
from opendelta.backends.sharding import class_name, full, full_shape
from opendelta.exceptions import CheckpointError
from opendelta.ground.names import dotted
from opendelta.ground.walk import every_parameter, uncompiled
from opendelta.mechanism.backbone_state import BackboneState, unmerged
from opendelta.mechanism.ownership import own_children, own_modules
from opendelta.mechanism.slot import ParameterSlot

# Bytes copied at once from a device or a non-contiguous tensor, so that no whole model is copied.
_PIECE = 1 << 24

Slots = dict[int, ParameterSlot]


def gen_parameter_hash(generator: Iterable[Tensor], md5: Any = None) -> Any:
    """Feed the bytes of tensors to an md5.

    Args:
        generator: tensors of any dtype (bf16 and quantised ones included) on any device.
        md5: the hash object to continue; None for a new one.

    Returns:
        The hash object; ``.hexdigest()`` gives the text.
    """
    md5 = hashlib.md5(usedforsecurity=False) if md5 is None else md5
    for tensor in generator:
        flat = full(tensor)
        if hasattr(flat, "__tensor_flatten__"):  # made of others, as torchao's are
            parts, _ = flat.__tensor_flatten__()
            gen_parameter_hash((getattr(flat, part) for part in parts), md5)
            continue
        if flat.is_quantized:
            gen_parameter_hash(_scales(flat), md5)
            flat = flat.int_repr()
        flat = flat.reshape(-1) if flat.is_contiguous() else flat.contiguous().reshape(-1)
        step = max(1, _PIECE // max(1, flat.element_size()))
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step].cpu().view(torch.uint8)
            md5.update(piece.numpy().data)
    return md5


def gen_model_hash(
    model: nn.Module, with_parameters: bool = True, excludes: Collection[str] = ()
) -> str:
    """The md5 of a model: its printed structure without whitespace, then its parameters' bytes.

    Deltas are left out, so the hash of a backbone is the same before and after one is put on it;
    the model may run meanwhile. The parameters of a sharded model are made whole one at a time, so
    that the hash is that of the whole model: call it on all ranks or on none.

    Args:
        model: the backbone.
        with_parameters: whether parameters count, or the structure alone.
        excludes: names of parameters that do not count.

    Returns:
        32 hex digits.

    Raises:
        CheckpointError: if its parameters are not at hand, or not as they were loaded.
    """
    model = uncompiled(model)
    reason = unhashable(model) if with_parameters else None
    if reason is not None:
        raise CheckpointError(f"This {type(model).__name__} has no hash now: {reason}.")
    md5 = structure_hash(model)
    if with_parameters:
        md5 = gen_parameter_hash((p for n, p in bare_parameters(model) if n not in excludes), md5)
    return str(md5.hexdigest())


def unhashable(model: nn.Module) -> str | None:
    """Why the parameters of a model have no hash now, None if they have."""
    if any(p.is_meta for p in every_parameter(model)):
        return "some of its weights are offloaded or on the meta device"
    if has_repacked(model):
        return "bitsandbytes repacked its weights for evaluation (model.state_dict() unpacks them)"
    return None


def structure_hash(model: nn.Module) -> Any:
    """The md5 object of a model's printed structure, to be continued with its parameters."""
    structure = re.sub(r"[ \t\n]", "", _structure(model, _slots(model)))
    return hashlib.md5(structure.encode(), usedforsecurity=False)


def bare_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters()` that the model has, or had, without its deltas."""
    slots, originals, seen = _slots(model), unmerged(model), set()
    for name, module in own_modules(model, originals=True):
        for own_name, p in _bare(module, slots).items():
            if p is not None:
                own = originals.get(id(p), p)
                if id(own) not in seen:
                    seen.add(id(own))
                    yield dotted(name, own_name), own


def _slots(model: nn.Module) -> Slots:
    """The places of parameters that deltas replaced, by the module that holds them."""
    return {
        id(place): slot
        for state in BackboneState.within(model)
        for slot in state.slots.values()
        for place in slot.places
    }


def _bare(module: nn.Module, slots: Slots) -> dict[str, nn.Parameter | None]:
    """The direct parameters of a module as they are without deltas."""
    slot = slots.get(id(module))
    if slot is None:
        return module._parameters
    parameters = dict(module._parameters)
    original = slot.original if slot.top is not None else parameters.get(slot.name)
    if original is None and not slot.existed[slot.places.index(module)]:
        parameters.pop(slot.name, None)
    else:
        parameters[slot.name] = original
    return parameters


def _structure(module: nn.Module, slots: Slots) -> str:
    """`str(module)` without deltas, up to whitespace."""
    cls = type(module)
    name = module._get_name()
    if name == cls.__name__:
        name = class_name(module)  # as it was before FSDP2
    children = [(key, _structure(child, slots)) for key, child in own_children(module, True)]
    if cls.__repr__ is nn.ModuleList.__repr__:
        return f"{name}({_folded(children)})"
    if cls.__repr__ is not nn.Module.__repr__ and cls.__repr__ is not nn.ModuleDict.__repr__:
        return repr(module)  # a module that prints itself in its own way
    parameters = [p for p in module._parameters.values() if p is not None]
    changed = id(module) in slots or any(full_shape(p) != p.shape for p in parameters)
    extra = _described(module, slots) if changed else module.extra_repr()
    return f"{name}({extra}{''.join(f'({key}):{text}' for key, text in children)})"


def _described(module: nn.Module, slots: Slots) -> str:
    """`extra_repr` of a module with its own parameters (``bias=True``), each in its whole shape."""
    twin = object.__new__(type(module))
    shapes = {
        name: None if p is None else torch.empty(full_shape(p), dtype=p.dtype, device="meta")
        for name, p in _bare(module, slots).items()
    }
    twin.__dict__.update(module.__dict__, _parameters=shapes)
    return twin.extra_repr()


def _folded(children: list[tuple[str, str]]) -> str:
    """The children of a `ModuleList` as it prints them, equal neighbours once."""
    text = ""
    for content, group in groupby(children, key=lambda child: child[1]):
        keys = [key for key, _ in group]
        many = f"({keys[0]}-{keys[-1]}):{len(keys)}x" if len(keys) > 1 else f"({keys[0]}):"
        text += many + content
    return text


def _scales(tensor: Tensor) -> list[Tensor]:
    """What a torch-quantised tensor multiplies its integers by."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
