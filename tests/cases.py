"""Which delta goes where: the six methods on ten tiny backbones (tests/golden/backbones.py)."""

from __future__ import annotations

from typing import Any

import backbones
import torch
import transformers
import weights
from packaging.version import Version
from torch import nn

import opendelta
from opendelta import DeltaBase

METHODS = (
    "LoraModel",
    "AdapterModel",
    "LowRankAdapterModel",
    "CompacterModel",
    "ParallelAdapterModel",
    "BitFitModel",
)
BACKBONES = ("bert", "roberta", "deberta", "gpt2", "opt", "t5", "bart", "llama", "vit", "mlp")
PAIRS = [(method, backbone) for method in METHODS for backbone in BACKBONES]

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
    "BitFitModel": {"modified_modules": ["first", "last"]},
}


def put(method: str, backbone: str, model: nn.Module, **kwargs: Any) -> DeltaBase:
    """The method with its defaults on `model`."""
    plain = _PLAIN[method] if backbone == "mlp" else {}
    delta: DeltaBase = getattr(opendelta, method)(model, **{**plain, **kwargs})
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
