"""Fingerprints of backbones: md5 over a model's structure and parameters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.backbone_state import bare
from opendelta.insertion import uncompiled

# Bytes copied at once from a device or a non-contiguous tensor, so that no whole model is copied.
_PIECE = 1 << 24


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
        flat = tensor.detach()
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

    Deltas are left out, so the hash of a backbone is the same before and after one is put on it.

    Args:
        model: the backbone.
        with_parameters: whether parameters count, or the structure alone.
        excludes: names of parameters that do not count.

    Returns:
        32 hex digits.
    """
    model = uncompiled(model)
    with bare(model):
        structure = re.sub(r"[ \t\n]", "", _structure(model))
        md5 = hashlib.md5(structure.encode(), usedforsecurity=False)
        if with_parameters:
            md5 = gen_parameter_hash(
                (p for name, p in model.named_parameters() if name not in excludes), md5
            )
    return md5.hexdigest()


def _structure(model: nn.Module) -> str:
    """`str(model)` with the class names that a sharding engine changed put back."""
    text = str(model)
    for cls in {type(module) for module in model.modules()}:
        plain = cls.__bases__[-1].__name__
        if cls.__name__ == f"FSDP{plain}":
            text = re.sub(rf"\b{cls.__name__}\(", f"{plain}(", text)
    return text


def _scales(tensor: Tensor) -> list[Tensor]:
    """What a torch-quantised tensor multiplies its integers by."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
