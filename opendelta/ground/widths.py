"""How wide the input and output of a module are, read off its attributes."""

from __future__ import annotations

from torch import nn

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
