"""How wide the input and output of a module are, read off its attributes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

# (input width, output width) attributes: Linear and quantised linears, transformers' Conv1D,
# convolutions, embeddings.
_ATTRIBUTES = (
    ("in_features", "out_features"),
    ("nx", "nf"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
)


def read_widths(module: nn.Module) -> tuple[int, int] | None:
    """(input, output) width of `module` by its attributes, or None where it has none.

    Attributes, not the weight's shape: a quantised or sharded weight has another one.
    """
    for source, target in _ATTRIBUTES:
        widths = getattr(module, source, None), getattr(module, target, None)
        if isinstance(widths[0], int) and isinstance(widths[1], int):
            return widths[0], widths[1]
    normalized = getattr(module, "normalized_shape", None)
    if isinstance(normalized, (tuple, list)) and normalized:
        return normalized[-1], normalized[-1]
    # ModelCenter's embeddings and norms say nothing, but what they hold notes its whole shape.
    whole = getattr(module._parameters.get("weight"), "_original_shape", None)
    return (whole[0], whole[-1]) if whole else None


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks up rows of a table."""
    return hasattr(module, "num_embeddings") or (
        hasattr(module, "padding_idx") and "weight" in module._parameters
    )


def example_inputs(module: Any) -> Tensor | None:
    """An input by which to tell what a layer computes, None where its attributes name none.

    Two rows for linears and norms, one image for convolutions, ids for embeddings; float32.
    """
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    widths = read_widths(module)
    if hasattr(module, "num_embeddings"):
        return torch.arange(min(4, module.num_embeddings), device=device)
    if hasattr(module, "kernel_size") and hasattr(module, "in_channels"):
        sizes = [2 * d * k for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        shape = (1, module.in_channels, *sizes)
    elif hasattr(module, "normalized_shape"):
        shape = (2, *module.normalized_shape)
    elif widths is not None:
        shape = (2, widths[0])
    else:
        return None
    return torch.linspace(-1, 1, math.prod(shape), device=device).view(shape)
