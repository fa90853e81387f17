"""Which delta goes where: every method on ten tiny backbones (tests/golden/backbones.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import backbones
import pytest
import torch
import transformers
import weights
from packaging.version import Version
from torch import nn

import opendelta
from opendelta import DeltaBase

# Every public class with a `delta_type`: a new method takes part by being there.
METHODS: tuple[str, ...] = tuple(
    name
    for name in opendelta.__all__
    if isinstance(cls := getattr(opendelta, name), type)
    and issubclass(cls, DeltaBase)
    and cls.delta_type
)
# These compute with layers or positions of their own: they are not the identity when new, and
# cannot be folded into a weight. Any other method is, and can.
OWN_LAYERS = {
    "AdapterModel",
    "CompacterModel",
    "LowRankAdapterModel",
    "ParallelAdapterModel",
    "PrefixModel",
    "SoftPromptModel",
}
FOLDING = tuple(method for method in METHODS if method not in OWN_LAYERS)

BACKBONES = ("bert", "roberta", "deberta", "gpt2", "opt", "t5", "bart", "llama", "vit", "mlp")
QUICK_BACKBONES = ("bert", "t5", "llama", "mlp")  # the others are for `make test-all`
# What has no attention takes no prefix, what reads no tokens no soft prompt.
IMPOSSIBLE = {("PrefixModel", "mlp"), ("SoftPromptModel", "mlp"), ("SoftPromptModel", "vit")}
PAIRS = [(m, b) for m in METHODS for b in BACKBONES if (m, b) not in IMPOSSIBLE]


def marked(pairs: Iterable[tuple[str, str]]) -> list[Any]:
    """Pairs of method and backbone as parameters: beyond the quick backbones they are slow."""
    return [
        pytest.param(*pair, marks=() if pair[1] in QUICK_BACKBONES else pytest.mark.slow)
        for pair in pairs
    ]


# Whether checkpointing is reentrant. Before 5.23 transformers checkpointed around the hooks of a
# block, where none can let gradients in; PyTorch warns that there will be none.
REENTRANT = [False, True] if Version(transformers.__version__) >= Version("5.23") else [False]

# A network that is no transformer has no defaults: name its modules.
_PLAIN: dict[str, dict[str, Any]] = {
    "LoraModel": {"modified_modules": ["first", "last"], "lora_r": 2},
    "AdapterModel": {"modified_modules": ["first"], "bottleneck_dim": 3},
    "LowRankAdapterModel": {"modified_modules": ["first"], "reduction_factor": 2},
    "CompacterModel": {"modified_modules": ["first"], "reduction_factor": 2},
    "ParallelAdapterModel": {"modified_modules": ["first", "last.1"], "bottleneck_dim": 3},
}
_ELSEWHERE: dict[str, dict[str, Any]] = {  # small: a default prefix has a network of 512 units
    "PrefixModel": {"prefix_token_num": 3, "embed_dim": 8, "mid_dim": 8},
    "SoftPromptModel": {"soft_token_num": 3, "trim_output": True},
}


def put(method: str, backbone: str, model: nn.Module, **kwargs: Any) -> DeltaBase:
    """The method on `model`: with its defaults, or on two modules of the plain network."""
    if backbone == "mlp":
        arguments = _PLAIN.get(method, {"modified_modules": ["first", "last"]})
    else:
        arguments = _ELSEWHERE.get(method, {})
    delta: DeltaBase = getattr(opendelta, method)(model, **{**arguments, **kwargs})
    return delta


def built(method: str, backbone: str, **kwargs: Any) -> tuple[nn.Module, DeltaBase]:
    """A fresh backbone in eval mode with the method on it."""
    model = backbones.build(backbone)
    delta = put(method, backbone, model, **kwargs)
    return model, delta


def randomise(delta: DeltaBase, scale: float = 0.25) -> None:
    """Fill a delta with numbers that follow from its parameters' names."""
    with torch.no_grad():
        for name, p in delta.named_parameters():
            p.copy_(weights.uniform("delta:" + name, p.shape, scale))


def output(model: nn.Module, backbone: str) -> torch.Tensor:
    """The model's logits or last hidden state, with its graph."""
    tensor: torch.Tensor = backbones.run.__wrapped__(model, backbone)  # type: ignore[attr-defined]
    return tensor


def loss(model: nn.Module, backbone: str) -> torch.Tensor:
    """A number that depends on every output."""
    out = output(model, backbone)
    return (out * weights.uniform("target", out.shape, 1.0)).mean()
