"""Methods with their modules named, and a backbone's whole state as one comparable dict."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import backbones
import torch
from cases import METHODS, randomise
from torch import Tensor, nn

import opendelta
from opendelta import DeltaBase, OpenDeltaError

# Where each method goes, by the backbone's own names.
TARGETS: dict[str, dict[str, list[str]]] = {
    "LoraModel": {
        "bert_cls": ["query", "value"],
        "gpt2": ["c_attn"],
        "t5": ["SelfAttention.q", "SelfAttention.v"],
        "llama": ["q_proj", "v_proj"],
        "mlp": ["first", "last"],
    },
    "AdapterModel": {
        "bert_cls": ["output.dense"],
        "gpt2": ["attn.c_proj", "mlp"],
        "llama": ["self_attn", "down_proj"],
        "mlp": ["first"],
    },
    "ParallelAdapterModel": {
        "bert_cls": ["attention", "attention"],
        "gpt2": ["attn", "attn", "c_fc", "mlp.c_proj"],
        "llama": ["gate_proj", "down_proj"],
        "mlp": ["first", "last.1"],
    },
    "BitFitModel": {
        "bert_cls": ["attention"],
        "gpt2": ["attn", "mlp"],
        "t5": ["SelfAttention", "layer_norm"],
        "llama": ["mlp", "input_layernorm"],
        "mlp": ["first", "last"],
    },
}
TARGETS["LowRankAdapterModel"] = TARGETS["CompacterModel"] = {  # placed as adapters are
    backbone: TARGETS["AdapterModel"][backbone] for backbone in ("bert_cls", "gpt2", "mlp")
}
# Prefixes and prompts go where attention and embeddings are, whatever those are called.
PLACED_METHODS = tuple(m for m in METHODS if m not in ("PrefixModel", "SoftPromptModel"))
for _method in PLACED_METHODS:  # a method that is not named above: on linears
    TARGETS.setdefault(_method, TARGETS["LoraModel"])
PLACED = tuple((method, backbone) for method in PLACED_METHODS for backbone in TARGETS[method])
_NARROW = {
    "LowRankAdapterModel": {"reduction_factor": 2},
    "CompacterModel": {"reduction_factor": 2},
}


def place(method: str, backbone: str, model: nn.Module | None = None, **kwargs: Any) -> DeltaBase:
    """The method on its modules of `model`, or of a fresh backbone in eval mode."""
    arguments = {
        "modified_modules": TARGETS[method][backbone],
        **(_NARROW.get(method, {}) if backbone == "mlp" else {}),
        **kwargs,
    }
    on = backbones.build(backbone) if model is None else model
    delta: DeltaBase = getattr(opendelta, method)(on, **arguments)
    return delta


def classifier(carrying: bool) -> Any:
    """A classifier in train mode with a frozen parameter, bare or with three deltas on it."""
    model: Any = backbones.build("bert_cls").train()
    model.bert.pooler.dense.bias.requires_grad = False
    if carrying:
        lora = opendelta.LoraModel(model, modified_modules=["key"], lora_r=2)
        randomise(lora)
        opendelta.AdapterModel(model, modified_modules=["intermediate"], bottleneck_dim=2).detach()
        opendelta.BitFitModel(model, modified_modules=["0.output"])
        lora.freeze_module(exclude=["deltas", "classifier"])
    return model


def hosts(delta: DeltaBase) -> list[str]:
    """Names of the backbone's modules that hold a module of the delta now, in module order."""
    own = set(delta.modules())
    return [
        name
        for name, module in delta.backbone_model.named_modules()
        if module not in own and any(child in own for child in module.children())
    ]


def trainable(model: nn.Module) -> set[str]:
    """Names of the parameters that require grad, one per tied parameter."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


def digest(tensor: Tensor) -> str:
    """Dtype, shape and the exact bytes of a tensor, short enough to read in a failure."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    content = hashlib.md5(flat.numpy().tobytes(), usedforsecurity=False).hexdigest()[:12]
    return f"{tensor.dtype} {tuple(tensor.shape)} {content}"


def contents(model: nn.Module) -> dict[str, str]:
    """A model's state dict, each tensor as its digest."""
    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a backbone that a failed call must leave alone.

    Parameters and buffers (identity, bytes, flags), the modules (identity, class, train mode,
    attributes, all hook dicts), the state dict, the deltas, and the random states.
    """
    state: dict[str, Any] = {}
    content: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        flags = (p.requires_grad, p.grad is None, getattr(p, "_is_delta", False))
        content[id(p)] = content.get(id(p)) or digest(p)
        state[f"parameter {name}"] = (id(p), content[id(p)], *flags)
    for name, b in model.named_buffers(remove_duplicate=False):
        state[f"buffer {name}"] = (id(b), digest(b))
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"module {name}"] = (id(module), type(module).__qualname__, module.training)
        for attribute, value in vars(module).items():
            if "_hooks" in attribute:
                hooks = tuple((key, id(hook)) for key, hook in (value or {}).items())
                state[f"hooks {name} {attribute}"] = hooks
            elif attribute in ("_parameters", "_buffers", "_modules"):
                state[f"children {name} {attribute}"] = tuple(value)
            else:
                state[f"attribute {name} {attribute}"] = id(value)
    for key, tensor in model.state_dict(keep_vars=True).items():
        state[f"state_dict {key}"] = content.get(id(tensor)) or digest(tensor)
    state["deltas"] = [(id(d), d.is_attached) for d in opendelta.deltas(model)]
    state["torch random state"] = digest(torch.get_rng_state())
    state["python random state"] = hash(random.getstate())
    return state


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fail if the block leaves anything about `model` other than it was."""
    before = fingerprint(model)
    yield
    after = fingerprint(model)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, f"changed: {changed[:10]}"


def told(error: BaseException, words: tuple[str, ...]) -> None:
    """Check that the library itself speaks, and that its message holds the words."""
    assert isinstance(error, OpenDeltaError), repr(error)
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{missing} not in {error}"
