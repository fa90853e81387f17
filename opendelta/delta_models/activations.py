"""Activation functions by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from opendelta.exceptions import ConfigError, nearest

# The six names of 0.3.2.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "swish": nn.SiLU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu_orig": nn.GELU,
    "leakyrelu": nn.LeakyReLU,
}


def activation(name: str) -> nn.Module:
    """A new activation module.

    Args:
        name: one of 0.3.2's (relu, tanh, swish, gelu_new, gelu_orig, leakyrelu), or any that
            transformers knows (gelu, silu, quick_gelu, ...); upper and lower case are equal.

    Raises:
        ConfigError: for another name, with the nearest one.
    """
    key = name.lower()
    if key in ACTIVATIONS:
        return ACTIVATIONS[key]()
    from transformers.activations import ACT2FN  # late: importing transformers takes a second

    if key in ACT2FN:
        return ACT2FN[key]
    choices = [*ACTIVATIONS, *ACT2FN]
    raise ConfigError(
        f"non_linearity={name!r} is not a known activation."
        + nearest(key, choices)
        + f" Known are {', '.join(dict.fromkeys(choices))}."
    )
