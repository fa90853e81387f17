"""Modules of a delta's own, made of the sizes that a file's tensors have."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from opendelta.addressing.patterns import REGEX_MARK, matches
from opendelta.delta.own_modules import bare_copy
from opendelta.exceptions import CheckpointError
from opendelta.ground.walk import named_tensors
from opendelta.mechanism.ownership import own_modules

# Attribute that says a size -> the dimension of the weight that has it, by kind of module; a kind
# is told by having all of its attributes.
_SIZES: list[dict[str, int]] = [
    {"in_features": 1, "out_features": 0},
    {"nx": 0, "nf": 1},
    {"num_embeddings": 0, "embedding_dim": 1},
    {"num_features": 0},
    {"num_channels": 0},
]


def made_modules(
    backbone: nn.Module,
    names: list[str],
    tensors: Mapping[str, Tensor],
    given: Mapping[str, nn.Module],
) -> dict[str, nn.Module]:
    """What is to stand in the places that a config names: pattern -> module.

    It is a copy of the backbone's own where the file's tensors have its shapes, else a linear,
    `Conv1D`, convolution, embedding or norm of other sizes. No class that a file names is imported.

    Args:
        backbone: the model; `names`: the places in it.
        tensors: what the file holds.
        given: pattern -> module, by the user.

    Raises:
        CheckpointError: for any other module, saying how to give it.
    """
    places = dict(own_modules(backbone, originals=True))
    made: dict[str, nn.Module] = {}
    for name in names:
        if name not in places:
            raise CheckpointError(
                f"The delta has a module of its own at {name!r}, which this "
                f"{type(backbone).__name__} does not have."
            )
        by_user = next((m for pattern, m in given.items() if matches(name, pattern)), None)
        pattern = f"{REGEX_MARK}^{re.escape(name)}$"
        if by_user is not None:
            made[pattern] = copy.deepcopy(by_user)
            continue
        prefix = f"{name}."
        held = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        own = bare_copy(backbone, name, places[name])
        if {n: t.shape for n, t in named_tensors(own)} != {n: t.shape for n, t in held.items()}:
            resized = _of_sizes(own, held)
            if resized is None:
                sizes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in held.items())
                raise CheckpointError(
                    f"The delta's own {name!r} is no {type(own).__name__} as this "
                    f"{type(backbone).__name__} has there (the file: {sizes or 'nothing'}): give "
                    f"it, from_finetuned(..., own_modules={{{name!r}: module}})."
                )
            own = resized
        made[pattern] = own
    return made


def _of_sizes(own: Any, held: Mapping[str, Tensor]) -> nn.Module | None:
    """`own`, a copy, with parameters and buffers of other sizes; None where that is not enough."""
    weight, here = held.get("weight"), {name for name, _ in named_tensors(own)}
    if weight is None or own._modules or not set(held) <= here | {"bias"}:
        return None
    old = own._parameters.get("weight")
    if old is None or old.dim() != weight.dim():
        return None
    outputs = weight.shape[1:] if hasattr(own, "nf") else weight.shape[:1]
    is_norm = isinstance(getattr(own, "normalized_shape", None), tuple)
    if "bias" in held and held["bias"].shape != (weight.shape if is_norm else outputs):
        return None
    sizes = next((s for s in _SIZES if all(hasattr(own, name) for name in s)), None)
    if isinstance(getattr(own, "kernel_size", None), tuple):
        if weight.shape[2:] != old.shape[2:]:  # another window is another function
            return None
        own.out_channels, own.in_channels = weight.shape[0], weight.shape[1] * own.groups
    elif sizes is not None:
        for name, dimension in sizes.items():
            setattr(own, name, weight.shape[dimension])
    elif isinstance(getattr(own, "normalized_shape", None), tuple):
        own.normalized_shape = tuple(weight.shape)
    elif weight.dim() != 1:  # a norm that scales alone says no size
        return None
    for name in (here | set(held)) - own._buffers.keys():
        like = own._parameters.get(name)
        shape = held[name].shape if name in held else None
        like = old if like is None else like
        own._parameters[name] = (
            None if shape is None else nn.Parameter(like.detach().new_empty(shape))
        )
    for name in own._buffers.keys() & set(held):
        own._buffers[name] = own._buffers[name].new_empty(held[name].shape)
    return own
