"""Inputs by which to tell what a module computes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.ground.widths import is_embedding, read_widths


def example_input(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A small input of a layer, evenly spread over [-1, 1]; ids for an embedding.

    Args:
        module: a linear, convolution, embedding, norm, or what tells its width as these do.
        dtype: of the input, where it holds no ids.

    Returns:
        The input, None for any other module.
    """
    layer: Any = module
    device = next((p.device for p in module._parameters.values() if p is not None), None)
    if is_embedding(module):
        widths = read_widths(module)
        return None if widths is None else torch.arange(min(4, widths[0]), device=device)
    if hasattr(layer, "in_channels") and hasattr(layer, "kernel_size"):
        gaps = zip(layer.dilation, layer.kernel_size, strict=True)
        shape: tuple[int, ...] = (1, layer.in_channels, *(2 * d * k for d, k in gaps))
    elif hasattr(layer, "num_features"):  # a batch norm, or one that norms each channel
        spatial = {"1d": 1, "2d": 2, "3d": 3}.get(type(layer).__name__[-2:], 0)
        shape = (2, layer.num_features, *[2] * spatial)
    elif isinstance(getattr(layer, "normalized_shape", None), (tuple, list)):
        shape = (2, *layer.normalized_shape)
    elif (known := read_widths(module)) is not None:
        shape = (2, known[0])
    else:
        return None
    return torch.linspace(-1, 1, math.prod(shape), dtype=dtype, device=device).view(shape)
