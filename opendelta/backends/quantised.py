"""Quantised and offloaded backbones: where a delta lives on them, and their known traps.

Linears are told by their attributes, so that no package is named or imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import full
from opendelta.exceptions import DeltaWarning, warn
from opendelta.ground.names import dotted
from opendelta.ground.walk import every_parameter


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype in which a quantised layer says that it computes; its storage may be any other."""
    said = module.__dict__.get("compute_dtype")
    return said if isinstance(said, torch.dtype) else None


def execution_device(module: nn.Module) -> torch.device | None:
    """Where Accelerate runs a module whose weights it keeps elsewhere (on the CPU or the disk)."""
    hook = module.__dict__.get("_hf_hook")
    for one in (hook, *getattr(hook, "hooks", ())):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate puts other tensors into the places of a module's at each forward."""
    away = any(p is not None and p.is_meta for p in module._parameters.values())
    return away and execution_device(module) is not None


def is_repacked(p: Tensor) -> bool:
    """Whether bitsandbytes repacked a 4-bit weight for evaluation on this CPU."""
    return bool(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False))


def may_repack(backbone: nn.Module) -> bool:
    """Whether a backbone holds 4-bit weights of bitsandbytes."""
    packed = (p for p in every_parameter(backbone) if type(p) is not nn.Parameter)
    return any(hasattr(p, "quant_state") for p in packed)


def has_repacked(module: nn.Module) -> bool:
    """Whether a module holds weights that are repacked now."""
    return any(is_repacked(p) for p in every_parameter(module) if type(p) is not nn.Parameter)


def warn_of_repacking(backbone: nn.Module) -> None:
    """Before the forward of a backbone with 4-bit weights."""
    if backbone.training and torch.is_grad_enabled() and has_repacked(backbone):
        warn(
            "bitsandbytes repacked 4-bit weights in an evaluation on this CPU, and no gradient "
            "passes through them: the layers below will not train. Call `model.state_dict()`, "
            "which unpacks them, after each evaluation and before training on.",
            DeltaWarning,
        )


def parts(tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """What a tensor is stored as: itself, called ``""``, or the parts of a quantised or sparse one.

    A shard is made whole first. Parts are called as ``__tensor_flatten__()`` says, which torchao's
    and quanto's tensors have. What bitsandbytes keeps beside a tensor of codes is no part of it: it
    moves 8-bit scales about, and rounds 4-bit ones when it repacks them.
    """
    whole = full(tensor)
    if hasattr(whole, "__tensor_flatten__"):
        for name in whole.__tensor_flatten__()[0]:
            for inner, part in parts(getattr(whole, name)):
                yield dotted(name, inner), part
    elif whole.is_quantized:
        yield "int_repr", whole.int_repr()
        if whole.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield "scale", torch.tensor(whole.q_scale(), dtype=torch.float64, device="cpu")
            yield "zero_point", torch.tensor(whole.q_zero_point(), device="cpu")
        else:
            yield "scale", whole.q_per_channel_scales()
            yield "zero_point", whole.q_per_channel_zero_points()
            yield "axis", torch.tensor(whole.q_per_channel_axis(), device="cpu")
    elif whole.layout != torch.strided:
        sparse = whole.to_sparse().coalesce()
        yield "indices", sparse.indices()
        yield "values", sparse.values()
        yield "size", torch.tensor(sparse.shape, device="cpu")
    else:
        yield "", whole
