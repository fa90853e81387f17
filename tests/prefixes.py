"""What the tests of prefixes share: tiny backbones with a prefix on them."""

from __future__ import annotations

import math
from typing import Any

import backbones
import torch
import transformers
import weights
from cases import randomise
from torch import Tensor, nn

from opendelta import PrefixModel

TOKENS = 3
SMALL = {"prefix_token_num": TOKENS, "embed_dim": 8, "mid_dim": 8}
FAMILIES = ("bert", "roberta", "distilbert", "deberta", "gpt2", "opt", "llama", "t5", "bart", "vit")
LOOKED_UP = tuple(family for family in FAMILIES if family != "deberta")
DECODERS = ("gpt2", "opt", "llama", "t5", "bart_lm")


def build(family: str, implementation: str = "sdpa") -> nn.Module:
    """A tiny backbone; ``bart_lm`` is one with a head, which can generate."""
    if family == "bart_lm":
        config = backbones.build("bart").config
        model = transformers.BartForConditionalGeneration(config)
        weights.fill(model).eval()
    else:
        model = backbones.build(family)
    if family != "deberta":
        model.set_attn_implementation(implementation)
    return model


def prefixed(
    family: str, implementation: str = "sdpa", **kwargs: Any
) -> tuple[nn.Module, PrefixModel]:
    model = build(family, implementation)
    delta = PrefixModel(model, **{**SMALL, "reparameterize": False, **kwargs})
    randomise(delta, 0.5)
    return model, delta


def run(model: nn.Module, family: str) -> Tensor:
    return backbones.run(model, "bart" if family == "bart_lm" else family)


def hosts(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if "prefix" in m._modules}


def close(actual: Tensor, expected: Tensor, within: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < within * max(1.0, float(expected.detach().abs().max()))


PROJECTIONS = {  # q, k, v, output below the attention module
    "bert": ("self.query", "self.key", "self.value", "output.dense"),
    "roberta": ("self.query", "self.key", "self.value", "output.dense"),
    "deberta": ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "gpt2": ("c_attn", "c_attn", "c_attn", "c_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "t5": ("q", "k", "v", "o"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "vit": ("q_proj", "k_proj", "v_proj", "o_proj"),
}

HEADS, DEPTH = 4, 16


class OwnAttention(nn.Module):
    """Causal attention computed inline by a network of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        self.v_proj, self.o_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        self.style = "softmax"

    def forward(self, x: Tensor) -> Tensor:
        split = [
            part(x).view(*x.shape[:2], HEADS, DEPTH).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        ]
        q, k, v = split
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.style == "softmax":
            scores = (q @ k.transpose(-1, -2)) / math.sqrt(DEPTH)
            joined = scores.masked_fill(hidden, -1e9).softmax(-1) @ v
        elif self.style == "scaled key":
            scores = torch.matmul(q, (k * DEPTH**-0.5).transpose(-1, -2))
            joined = torch.softmax(scores.masked_fill(hidden, -1e9), dim=-1).matmul(v)
        elif self.style.startswith("stacked"):
            q, k, v = (t.reshape(-1, x.shape[1], DEPTH) for t in split)
            zero = torch.zeros(1, 1, 1).expand(len(q), x.shape[1], x.shape[1])
            factors = {"beta": 1.0, "alpha": DEPTH**-0.5}
            if self.style == "stacked, named":
                scores = zero.baddbmm(batch1=q, batch2=k.transpose(1, 2), **factors)
            else:
                scores = zero.baddbmm(q, k.transpose(1, 2), **factors)
            probabilities = nn.functional.softmax(scores.masked_fill(hidden, -1e9), -1)
            joined = torch.bmm(probabilities, v).view(x.shape[0], HEADS, -1, DEPTH)
        else:
            options: dict[str, Any] = {
                "fused": {"is_causal": True},
                "fused, boolean": {"attn_mask": ~hidden},
                "fused, additive": {
                    "attn_mask": torch.zeros(hidden.shape).masked_fill(hidden, -9e9)
                },
            }[self.style]
            joined = nn.functional.scaled_dot_product_attention(q, k, v, **options)
        return self.o_proj(joined.transpose(1, 2).flatten(2))


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = OwnAttention()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.down(self.up(x).relu())


class OwnNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([OwnBlock() for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def prompt(family: str) -> dict[str, Any]:
    ids = backbones.inputs("gpt2")["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # left padding; for an encoder, padding anywhere
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}
