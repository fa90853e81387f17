"""Quantised and offloaded backbones: where a delta lives on them, and their known traps.

Linears are told by their attributes, so that no package is named or imported here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opendelta.exceptions import DeltaWarning, warn
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
