"""What every attention computes with a prefix, against sums done by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import backbones
import pytest
import torch
import transformers
import weights
from cases import randomise
from prefixes import (
    DEPTH,
    HEADS,
    LOOKED_UP,
    PROJECTIONS,
    SMALL,
    TOKENS,
    OwnNetwork,
    close,
    hosts,
    prefixed,
    prompt,
    run,
)
from torch import Tensor, nn

from opendelta import PrefixModel
from opendelta.exceptions import InsertionError

# --- by hand -------------------------------------------------------------------------------------


class Watch:
    """Records queries, keys, values and the context of one attention module."""

    def __init__(self, host: nn.Module, family: str) -> None:
        self.seen: dict[str, Tensor] = {}
        for role, name in zip("qkvo", PROJECTIONS[family], strict=True):
            part = host.get_submodule(name)
            if role == "o":
                part.register_forward_pre_hook(self.note(role, lambda args: args[0]))
            else:
                hook = self.note(role, lambda args: args[1])
                # DeBERTa projects its relative positions too, after queries, keys and values
                part.register_forward_hook(lambda m, args, out, hook=hook: hook(m, (args, out)))

    def note(self, role: str, pick: Callable[[Any], Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.seen.setdefault(role, pick(args).detach().double())

        return hook

    def parts(self, family: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, o = (self.seen[role] for role in "qkvo")
        if family == "gpt2":
            q, k, v = q.chunk(3, -1)
        return q, k, v, o


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: nn.Module,
    visible: Callable[[int, int, int], bool],
    scale: float,
    bias: Callable[[int, int, int], float] = lambda head, i, j: 0.0,
    terms: Tensor | None = None,
) -> Tensor:
    """Attention of (batch, tokens, width) tensors with the prefix joined, head by head.

    `visible(batch, i, j)` and `bias(head, i, j)` take positions of query and key in the text; the
    prefix's last position is -1. `terms` (batch * heads, queries, keys) is added to the scores.
    """
    past_k, past_v = (p.detach().double() for p in (prefix.past_key, prefix.past_value))
    kv_heads = k.shape[-1] // DEPTH
    result = torch.zeros(*q.shape[:2], HEADS * DEPTH, dtype=torch.double)
    for b in range(q.shape[0]):
        for head in range(HEADS):
            here = slice(head * DEPTH, (head + 1) * DEPTH)
            shared = head * kv_heads // HEADS
            there = slice(shared * DEPTH, (shared + 1) * DEPTH)
            for i in range(q.shape[1]):
                keys = [(j - TOKENS, past_k[j, there], past_v[j, there]) for j in range(TOKENS)]
                keys += [
                    (j, k[b, j, there], v[b, j, there])
                    for j in range(k.shape[1])
                    if visible(b, i, j)
                ]
                logits = []
                for j, key, _ in keys:
                    logit = float(q[b, i, here] @ key) * scale + bias(head, i, j)
                    if terms is not None and j >= 0:
                        logit += float(terms[b * HEADS + head, i, j])
                    logits.append(logit)
                chances = torch.tensor(logits, dtype=torch.double).softmax(0)
                result[b, i, here] = sum(
                    (p * value for p, (_, _, value) in zip(chances, keys, strict=True)),
                    torch.zeros(DEPTH, dtype=torch.double),
                )
    return result


def rotate(x: Tensor) -> Tensor:
    """Rotary positions, pair by pair: dimension n turns with n + half."""
    result = x.clone()
    half = DEPTH // 2
    for start in range(0, x.shape[-1], DEPTH):
        for n in range(half):
            for t in range(x.shape[1]):
                angle = t * 10000 ** (-n / half)
                a, b = x[:, t, start + n], x[:, t, start + n + half]
                result[:, t, start + n] = a * math.cos(angle) - b * math.sin(angle)
                result[:, t, start + n + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def t5_bucket(distance: int, bidirectional: bool) -> int:
    """T5's bucket of (key position - query position), for 8 buckets and a maximum of 16."""
    buckets, first = (4, 4 if distance > 0 else 0) if bidirectional else (8, 0)
    apart = abs(distance) if bidirectional else max(-distance, 0)
    exact = buckets // 2
    if apart < exact:
        return first + apart
    far = exact + int(math.log(apart / exact) / math.log(16 / exact) * (buckets - exact))
    return first + min(far, buckets - 1)


def relative_bias(model: Any, name: str) -> Callable[[int, int, int], float]:
    """T5's bias of one attention: each stack's first block holds the table for all of it."""
    if "EncDecAttention" in name:
        return lambda head, i, j: 0.0
    stack = model.encoder if name.startswith("encoder") else model.decoder
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.detach()
    both_ways = stack is model.encoder
    return lambda head, i, j: float(table[t5_bucket(j - i, both_ways), head])


EXPECTED_HOSTS = {"t5": 6, "bart": 6}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", LOOKED_UP)
def test_attention_with_a_prefix_by_hand(family: str, implementation: str) -> None:
    everywhere = {
        "t5": ["SelfAttention", "EncDecAttention"],
        "bart": ["self_attn", "encoder_attn"],
    }.get(family)
    model, _ = prefixed(family, implementation, modified_modules=everywhere)
    watches = {name: Watch(host, family) for name, host in hosts(model).items()}
    assert len(watches) == EXPECTED_HOSTS.get(family, 2)
    run(model, family)
    mask = backbones.inputs(family).get("attention_mask", torch.ones(2, 99))
    for name, watch in watches.items():
        q, k, v, context = watch.parts(family)
        if family == "llama":
            q, k = rotate(q), rotate(k)
        in_decoder = family in ("gpt2", "opt", "llama") or name.startswith("decoder")
        crossing = "encoder_attn" in name or "EncDec" in name
        causal = in_decoder and not crossing
        padded = family in ("gpt2", "opt", "llama") or crossing or not in_decoder

        def visible(b: int, i: int, j: int, causal: bool = causal, padded: bool = padded) -> bool:
            return not (causal and j > i) and not (padded and mask[b, j] == 0)

        expected = by_hand(
            q,
            k,
            v,
            hosts(model)[name].prefix,
            visible,
            1.0 if family == "t5" else DEPTH**-0.5,
            relative_bias(model, name) if family == "t5" else lambda head, i, j: 0.0,
        )
        close(context.flatten(2), expected, 1e-5)


def test_deberta_with_a_prefix_by_hand() -> None:
    """DeBERTa's relative terms are those of its own code for the text, and zero at the prefix."""
    model, _ = prefixed("deberta")
    watches = {name: Watch(host, "deberta") for name, host in hosts(model).items()}
    run(model, "deberta")
    table = model.encoder.get_rel_embedding()
    assert len(watches) == 2
    for name, watch in watches.items():
        q, k, v, context = watch.parts("deberta")
        attention = hosts(model)[name].get_submodule("self")
        stacked = [attention.transpose_for_scores(t.float(), HEADS) for t in (q, k)]
        terms = attention.disentangled_attention_bias(*stacked, None, table, 3)
        expected = by_hand(
            q,
            k,
            v,
            hosts(model)[name].prefix,
            lambda b, i, j: True,
            (3 * DEPTH) ** -0.5,
            terms=terms.detach().double(),
        )
        close(context, expected, 1e-5)


STYLES = (
    "softmax",
    "scaled key",
    "stacked",
    "stacked, named",
    "fused",
    "fused, boolean",
    "fused, additive",
)


@pytest.mark.parametrize("style", STYLES)
def test_attention_of_ones_own_with_a_prefix_by_hand(style: str) -> None:
    model = weights.fill(OwnNetwork()).eval()
    for layer in model.layers:
        layer.attn.style = style
    delta = PrefixModel(model, **SMALL, reparameterize=False, modified_modules=["attn"])
    randomise(delta, 0.5)
    PROJECTIONS["own"] = ("q_proj", "k_proj", "v_proj", "o_proj")
    watches = [Watch(layer.attn, "own") for layer in model.layers]
    model(torch.tensor([[3, 14, 15, 9], [2, 6, 5, 35]]))
    for watch, layer in zip(watches, model.layers, strict=True):
        q, k, v, context = watch.parts("own")
        prefix = layer.attn.prefix
        expected = by_hand(q, k, v, prefix, lambda b, i, j: j <= i, DEPTH**-0.5)
        close(context, expected, 1e-5)


# --- other attention -----------------------------------------------------------------------------


_COMMON = {"vocab_size": 128, "hidden_size": 64, "pad_token_id": 0, "eos_token_id": 2}


_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-query": ("Falcon", {"num_attention_heads": 4}),
    "grouped-query": (
        "Falcon",
        {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "stacked": ("Bloom", {"n_head": 4}),
    "ALiBi": ("Mpt", {"d_model": 64, "n_heads": 4, "max_seq_len": 64}),
    "latent": (
        "DeepseekV3",
        {
            **_LATENT,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "v_head_dim": 12,
            "intermediate_size": 64,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "sliding": (
        "Mistral",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "sliding_window": 4,
        },
    ),
    "beside a state space": (
        "Jamba",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
}


def other(kind: str, implementation: str) -> nn.Module:
    name, sizes = OTHERS[kind]
    config = getattr(transformers, name + "Config")(**{**_COMMON, **sizes})
    config.num_hidden_layers = 2
    config._attn_implementation = implementation
    return weights.fill(getattr(transformers, name + "ForCausalLM")(config)).eval()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_attention_in_both_implementations(kind: str) -> None:
    """Eager and SDPA agree, with cache and without, and no token sees the future."""
    ids = backbones.inputs("gpt2")["input_ids"]
    outputs = []
    name = OTHERS[kind][0]
    for implementation in ("eager",) if name in ("Bloom", "Mpt") else ("eager", "sdpa"):
        model = other(kind, implementation)
        delta = PrefixModel(model, **SMALL, reparameterize=False)
        assert len(hosts(model)) == (1 if name == "Jamba" else 2)
        with torch.no_grad():
            bare_and_acting = []
            for scale in (0.0, 1.0):
                randomise(delta, scale)
                bare_and_acting.append(model(ids).logits)
            outputs.append(bare_and_acting[1])
            assert (bare_and_acting[1] - bare_and_acting[0]).abs().amax(-1).min() > 1e-4
            close(model(ids[:, :4]).logits, outputs[-1][:, :4], 1e-5)
            options = {"max_new_tokens": 6, "do_sample": False, **prompt("gpt2")}
            cached = model.generate(**options)
            assert torch.equal(cached, model.generate(**options, use_cache=False))
    close(outputs[0], outputs[-1], 1e-5)


def test_what_only_stands_beside_attention_gets_no_prefix() -> None:
    model = other("beside a state space", "sdpa")
    PrefixModel(model, **SMALL)
    assert list(hosts(model)) == ["model.layers.1.self_attn"]
    with pytest.raises(InsertionError, match="'model.layers.0.mamba' .* no attention module"):
        PrefixModel(model, **SMALL, modified_modules=["mamba", "self_attn"])
    config = transformers.MambaConfig(**_COMMON, num_hidden_layers=1, state_size=4)
    with pytest.raises(InsertionError, match="MambaForCausalLM has no attention module"):
        PrefixModel(transformers.MambaForCausalLM(config))
