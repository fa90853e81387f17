"""Prefix tuning: what every attention computes with a prefix, against sums done by hand."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import transformers
import weights
from cases import REENTRANT, output, randomise
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

import opendelta
from opendelta import AdapterModel, AutoDeltaModel, LoraModel, PrefixModel
from opendelta.exceptions import CheckpointError, ConfigError, DeltaWarning, InsertionError

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


# --- by hand --------------------------------------------------------------------------------------
# What the projections gave and what came to the output projection are watched by hooks; the
# attention between them is summed up here, head by head.

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


# --- other attention ------------------------------------------------------------------------------

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


# --- a prefix that gets no weight -----------------------------------------------------------------


def with_a_constant_in_queries(family: str, implementation: str) -> nn.Module:
    """A backbone whose queries all point along one direction, whatever the text."""
    if family == "llama":
        config = backbones.build("llama").config
        config.attention_bias = True
        model = weights.fill(transformers.LlamaForCausalLM(config)).eval()
        model.set_attn_implementation(implementation)
    else:
        model = build(family, implementation)
    with torch.no_grad():
        if family == "t5":  # no biases: a constant channel takes their place
            model.shared.weight[:, 0] = 5.0
            for name, p in model.named_parameters():
                if name.endswith((".o.weight", ".wo.weight")):
                    p[0] = 0.0
                elif name.endswith("Attention.q.weight"):
                    p[:, 0] = 50.0
            return model
        for name, p in model.named_parameters():
            if name.endswith("c_attn.bias"):
                p[:64] += 50.0
            elif name.endswith(("query.bias", "q_lin.bias", "q_proj.bias", "query_proj.bias")):
                if family == "llama":  # only what rotary positions hardly turn
                    p[DEPTH // 2 - 1 :: DEPTH // 2] += 50.0
                else:
                    p += 50.0
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_without_weight_changes_nothing(family: str, implementation: str) -> None:
    model = with_a_constant_in_queries(family, implementation)
    bare = run(model, family)
    delta = PrefixModel(model, **SMALL, reparameterize=False)
    outputs = {}
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            for name, p in delta.named_parameters():
                if not name.endswith("past_key"):
                    p.copy_(weights.uniform(name, p.shape, 3.0))
                elif family == "llama":
                    p.zero_()[:, DEPTH // 2 - 1 :: DEPTH // 2] = sign * 1000.0
                else:
                    p.fill_(sign * 1000.0)
        outputs[sign] = run(model, family)
    close(outputs[-1.0], bare, 1e-5)
    assert (outputs[1.0] - bare).abs().max() > 1e-2


# --- decoding -------------------------------------------------------------------------------------


def prompt(family: str) -> dict[str, Any]:
    ids = backbones.inputs("gpt2")["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # left padding; for an encoder, padding anywhere
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_cache_equals_without(family: str, beams: int, implementation: str) -> None:
    sites = {"t5": ["SelfAttention", "EncDecAttention"], "bart_lm": ["self_attn", "encoder_attn"]}
    model, delta = prefixed(family, implementation, modified_modules=sites.get(family))
    randomise(delta, 2.0)
    options = {"max_new_tokens": 10, "num_beams": beams, "do_sample": False, **prompt(family)}
    cached = model.generate(**options, use_cache=True)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    delta.detach()
    assert not torch.equal(cached, model.generate(**options))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_static_cache_gives_the_same(family: str) -> None:
    model, delta = prefixed(family)
    randomise(delta, 2.0)
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, **prompt(family)}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**options)
    actual = model.generate(**options, cache_implementation="static")
    assert torch.equal(actual.sequences, expected.sequences)
    for one, other in zip(actual.logits, expected.logits, strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_step_by_step_logits_equal_those_of_the_whole(family: str, implementation: str) -> None:
    model, _ = prefixed(family, implementation)
    ids = backbones.inputs(family)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        cache, steps = None, []
        for part in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):  # several new tokens on a cache too
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    close(torch.cat(steps, 1), whole, 1e-5)
    assert cache.get_seq_length() == ids.shape[1]  # the prefix is never cached


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_left_padding_changes_nothing(family: str) -> None:
    model, delta = prefixed(family)
    randomise(delta, 2.0)
    ids = backbones.inputs(family)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    options["return_dict_in_generate"] = True
    alone = model.generate(ids[1:, 2:], attention_mask=torch.ones(1, 5).long(), **options)
    together = model.generate(ids, attention_mask=prompt(family)["attention_mask"], **options)
    assert torch.equal(together.sequences[1, 7:], alone.sequences[0, 5:])
    close(together.logits[0][1], alone.logits[0][0], 1e-5)


@pytest.mark.parametrize("family", ["t5", "bart_lm"])
def test_a_decoder_alone_with_encoder_outputs(family: str) -> None:
    """Reparameterised: the network sits in the encoder, which does not run in the second call."""
    model, delta = prefixed(family, reparameterize=True)
    given = backbones.inputs("bart")
    whole = model(**given)
    encoded = model.get_encoder()(given["input_ids"], given["attention_mask"])
    again = model(
        encoder_outputs=encoded,
        attention_mask=given["attention_mask"],
        decoder_input_ids=given["decoder_input_ids"],
    )
    close(again.logits, whole.logits, 1e-6)
    delta.zero_grad()
    detached = transformers.modeling_outputs.BaseModelOutput(encoded.last_hidden_state.detach())
    mask, decoder_ids = given["attention_mask"], given["decoder_input_ids"]
    out = model(encoder_outputs=detached, attention_mask=mask, decoder_input_ids=decoder_ids)
    out.logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in delta.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_no_token_sees_the_future_and_all_see_the_prefix(
    family: str, implementation: str, masked: bool
) -> None:
    model, delta = prefixed(family, implementation)
    given = backbones.inputs("bart" if family in ("t5", "bart_lm") else family)
    if not masked:
        given.pop("attention_mask")
    name = "decoder_input_ids" if family in ("t5", "bart_lm") else "input_ids"

    @torch.no_grad()
    def logits() -> Tensor:
        return model(**given).logits

    before = logits()
    given[name] = given[name].clone()
    given[name][:, 3:] = (given[name][:, 3:] + 40) % 100 + 5
    after = logits()
    close(after[:, :3], before[:, :3], 1e-6)
    assert (after[:, 3:] - before[:, 3:]).abs().amax(-1).min() > 1e-3
    with torch.no_grad():
        for parameter, p in delta.named_parameters():
            if not parameter.startswith(("encoder", "model.encoder")):
                p.mul_(-2)
    assert (logits() - after).abs().amax(-1).min() > 1e-4


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model, delta = prefixed(family, reparameterize=True)
        delta.freeze_module()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output(model, family).square().mean().backward()
        grads.append({n: p.grad for n, p in delta.named_parameters()})
        assert _get_current_function_mode() is None
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        assert expected is not None and expected.abs().max() > 0, name
        close(grads[1][name], expected, 1e-5)


@pytest.mark.parametrize("reparameterize", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_moves_the_prefix_and_nothing_else(family: str, reparameterize: bool) -> None:
    model, delta = prefixed(family, reparameterize=reparameterize)
    delta.freeze_module()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    output(model, family).square().mean().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    ours = {id(p) for p in delta.parameters()}
    assert moved == {n for n, p in model.named_parameters() if id(p) in ours} != set()


def test_dropout_of_attention_computed_inline_drops_the_prefix_too() -> None:
    model, delta = prefixed("deberta")
    model.train()
    for rate in (0.0, 1.0):
        for host in hosts(model).values():
            host.get_submodule("self.dropout").p = rate
        delta.zero_grad()
        output(model, "deberta").square().mean().backward()
        past = {n: p for n, p in delta.named_parameters() if n.endswith("past_value")}
        assert all((p.grad.abs().max() == 0) == (rate == 1.0) for p in past.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision(family: str, dtype: torch.dtype) -> None:
    exact, delta = prefixed(family)
    reference = run(exact, family)
    model = build(family).to(dtype)
    delta = PrefixModel(model, **SMALL, reparameterize=False)
    randomise(delta, 0.5)
    assert {p.dtype for p in delta.parameters()} == {dtype}
    given = backbones.inputs(family)
    result = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()})[0]
    assert result.dtype == dtype
    error = (result.float() - reference).abs().max() / reference.abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


# --- which attention ------------------------------------------------------------------------------


def test_any_choice_of_layers() -> None:
    model, plain = backbones.build("bert12"), backbones.build("bert12")
    layers = (3, 4, 6, 10)
    sites = [f"{n}.attention" for n in layers]
    delta = PrefixModel(model, **SMALL, modified_modules=sites, reparameterize=False)
    assert list(hosts(model)) == [f"encoder.layer.{n}.attention" for n in layers]
    randomise(delta, 0.5)
    given = backbones.inputs("bert12")
    with torch.no_grad():
        ours = model(**given, output_hidden_states=True).hidden_states
        theirs = plain(**given, output_hidden_states=True).hidden_states
    for n in range(13):
        assert torch.equal(ours[n], theirs[n]) == (n <= 3), n
    with torch.no_grad():
        for p in delta.get_submodule("encoder.layer.6").parameters():
            p.mul_(2)
        now = model(**given, output_hidden_states=True).hidden_states
    for n in range(13):
        assert torch.equal(ours[n], now[n]) == (n <= 6), n


def test_the_defaults() -> None:
    expected = {
        "prefix_token_num": 6,
        "reparameterize": True,
        "embed_dim": 512,
        "mid_dim": 512,
        "modified_modules": ["attn"],
    }
    delta = PrefixModel(backbones.build("bert"))
    assert {name: getattr(delta, name) for name in expected} == expected
    assert delta.config.delta_type == "prefix"
    shapes = {name: tuple(p.shape) for name, p in delta.named_parameters()}
    first = "encoder.layer.0.attention.reparams."
    assert shapes[first + "wte.weight"] == (6, 512)
    assert shapes[first + "control_trans.0.weight"] == (512, 512)
    assert shapes[first + "control_trans.2.weight"] == (2 * 2 * 64, 512)
    assert len(shapes) == 5


def test_the_network_generates_what_it_should() -> None:
    """Key, value, key, value ... of the modules in order are the columns of its output."""
    model, delta = prefixed("llama", reparameterize=True)
    by_end = {n.rpartition("reparams.")[2]: p for n, p in delta.named_parameters()}
    with torch.no_grad():
        hidden = torch.tanh(
            by_end["wte.weight"] @ by_end["control_trans.0.weight"].T
            + by_end["control_trans.0.bias"]
        )
        out = hidden @ by_end["control_trans.2.weight"].T + by_end["control_trans.2.bias"]
    assert out.shape == (TOKENS, 4 * 32)  # two heads of keys, 16 wide
    expected = run(model, "llama")
    other, plain = prefixed("llama")
    with torch.no_grad():
        for n, layer in enumerate(("0", "1")):
            node = plain.get_submodule(f"model.layers.{layer}.self_attn.prefix")
            node.past_key.copy_(out[:, n * 64 : n * 64 + 32])
            node.past_value.copy_(out[:, n * 64 + 32 : n * 64 + 64])
    close(run(other, "llama"), expected, 1e-6)


@pytest.mark.parametrize("family", LOOKED_UP)
def test_attention_weights_have_the_prefix_in_front(family: str) -> None:
    model, _ = prefixed(family, "eager")
    given = backbones.inputs(family)
    with torch.no_grad():
        out = model(**given, output_attentions=True)
    kinds = [k for k in out if k.endswith("attentions") and out[k] is not None]
    assert kinds
    for kind in kinds:
        for layer in out[kind]:
            queries = layer.shape[2]
            if kind == "cross_attentions":  # not prefixed by default
                assert layer.shape[-1] == 7
            else:
                assert layer.shape == (2, HEADS, queries, TOKENS + queries)
            close(layer.sum(-1), torch.ones(2, HEADS, queries), 1e-5)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"prefix_token_num": 0}, ConfigError, "prefix_token_num=0"),
        ({"embed_dim": 0}, ConfigError, "embed_dim=0"),
        ({"mid_dim": -1}, ConfigError, "mid_dim=-1"),
        ({"modified_modules": ["layer.2.DenseReluDense"]}, InsertionError, "no attention module"),
        ({"modified_modules": ["decoder.block.0"]}, InsertionError, "holds 2 attention modules"),
    ],
)
def test_what_takes_no_prefix_is_refused(
    kwargs: dict[str, Any], error: type[Exception], says: str
) -> None:
    model = build("t5")
    before = {n: len(m._forward_hooks) for n, m in model.named_modules()}
    with pytest.raises(error, match=says):
        PrefixModel(model, **{**SMALL, **kwargs})
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == before


class Additive(OwnAttention):
    """Attention without products of queries and keys."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x).unsqueeze(2) + self.k_proj(x).unsqueeze(1)
        return self.o_proj((scores.tanh().softmax(2) * self.v_proj(x).unsqueeze(1)).sum(2))


def test_attention_that_no_prefix_can_join_says_so() -> None:
    model = OwnNetwork()
    model.layers[1].attn = Additive()
    PrefixModel(model, **SMALL, modified_modules=["attn"])
    with pytest.raises(InsertionError, match=r"attention of Additive .* takes no prefix"):
        model(torch.tensor([[1, 2, 3]]))
    assert _get_current_function_mode() is None


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    """As that of flex attention; here an attention function of the user's own asks for one."""
    seen = []

    def own(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append(mask)
        return torch.zeros_like(q).transpose(1, 2), None

    transformers.AttentionInterface.register("own_for_this_test", own)
    model, delta = prefixed("llama", "own_for_this_test")
    attention = model.model.layers[0].self_attn
    x, angles = torch.zeros(1, 4, 64), (torch.ones(1, 4, DEPTH), torch.zeros(1, 4, DEPTH))
    with pytest.raises(InsertionError, match="own_for_this_test"):
        attention(x, position_embeddings=angles, attention_mask=object())
    assert not seen
    delta.detach()
    attention(x, position_embeddings=angles, attention_mask=object())
    assert len(seen) == 1


def test_a_window_without_a_mask_is_refused_where_it_would_leave_the_prefix_behind() -> None:
    """As FlashAttention's: it counts keys, and the prefix is the first of them."""
    widths = []

    def flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        widths.append(k.shape[-2])
        return torch.zeros_like(q).transpose(1, 2), None

    transformers.AttentionInterface.register("flash_for_this_test", flash)
    model, delta = prefixed("llama")
    model.config._attn_implementation = "flash_for_this_test"
    attention = model.model.layers[0].self_attn

    def run_with(window: int | None) -> None:
        x, angles = torch.zeros(1, 4, 64), (torch.ones(1, 4, DEPTH), torch.zeros(1, 4, DEPTH))
        attention(x, position_embeddings=angles, attention_mask=None, sliding_window=window)

    run_with(None)
    run_with(4 + TOKENS)
    with pytest.raises(InsertionError, match=rf"{3 + TOKENS} tokens .*sdpa"):
        run_with(3 + TOKENS)
    assert widths == [4 + TOKENS] * 2
    delta.detach()
    run_with(3)


# --- together with others -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "deberta", "llama", "t5"])
def test_two_prefixes_act_as_one_longer(family: str) -> None:
    model, first = prefixed(family)
    second = PrefixModel(model, reparameterize=False, prefix_token_num=2)
    randomise(second, 0.7)
    both = run(model, family)
    other, joint = prefixed(family, prefix_token_num=TOKENS + 2)
    parts = dict(first.named_parameters()), dict(second.named_parameters())
    with torch.no_grad():
        for name, p in joint.named_parameters():
            p.copy_(torch.cat([part[name] for part in parts]))
    close(both, run(other, family), 1e-5)
    first.detach()
    alone = run(model, family)
    fresh, only = prefixed(family, prefix_token_num=2)
    randomise(only, 0.7)
    close(alone, run(fresh, family), 1e-6)


def test_beside_lora_and_adapter_in_either_order() -> None:
    outputs = []
    for prefix_first in (True, False):
        model = build("llama")
        makers: list[Any] = [
            lambda m: PrefixModel(m, **SMALL, reparameterize=False),
            lambda m: LoraModel(m, lora_r=2),
            lambda m: AdapterModel(m, bottleneck_dim=4),
        ]
        for maker in makers if prefix_first else makers[::-1]:
            randomise(maker(model), 0.5)
        outputs.append(run(model, "llama"))
    close(*outputs, 1e-6)
    alone, _ = prefixed("llama")
    assert (run(alone, "llama") - outputs[0]).abs().max() > 1e-2


# --- on and off, copies ---------------------------------------------------------------------------


@pytest.mark.parametrize("reparameterize", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_detach_attach_and_remove(family: str, reparameterize: bool) -> None:
    bare = build(family)
    hooks = {n: hook_counts(m) for n, m in bare.named_modules()}
    plain = run(bare, family)
    model, delta = prefixed(family, reparameterize=reparameterize)
    delta.freeze_module()
    acting = run(model, family)
    assert (acting - plain).abs().max() > 1e-3
    delta.detach()
    assert torch.equal(run(model, family), plain)
    assert set(model.state_dict()) == set(bare.state_dict())
    delta.attach()
    assert torch.equal(run(model, family), acting)
    assert set(model.state_dict()) == {n for n, p in model.named_parameters() if p.requires_grad}
    delta.remove()
    assert torch.equal(run(model, family), plain)
    assert {n: hook_counts(m) for n, m in model.named_modules()} == hooks
    assert str(model) == str(bare) and opendelta.deltas(model) == []
    assert list(model.state_dict()) == list(bare.state_dict())


def hook_counts(module: nn.Module) -> dict[str, int]:
    return {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks")}


@pytest.mark.parametrize("reparameterize", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["bert", "deberta", "t5", "llama"])
def test_a_copy_has_a_prefix_of_its_own(
    family: str, way: str, reparameterize: bool, tmp_path: Path
) -> None:
    model, delta = prefixed(family, reparameterize=reparameterize)
    delta.freeze_module()
    acting = run(model, family)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(twin, family), acting)
    (theirs,) = opendelta.deltas(twin)
    assert not {id(p) for p in theirs.parameters()} & {id(p) for p in delta.parameters()}
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(-1)
    assert not torch.equal(run(twin, family), acting)
    assert torch.equal(run(model, family), acting)
    theirs.detach()
    assert torch.equal(run(twin, family), run(build(family), family))
    assert torch.equal(run(model, family), acting)


def replica(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """What `nn.DataParallel` makes of a module: shallow copies with tensors for parameters."""
    if id(module) in made:
        return made[id(module)]
    copied = made[id(module)] = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else replica(child, made)
    for name, p in module._parameters.items():
        copied._parameters[name] = None
        if p is not None:
            del copied._parameters[name]
            object.__setattr__(copied, name, p.detach().clone())
    return copied


@pytest.mark.parametrize("family", ["bert", "deberta", "t5", "llama"])
def test_replicas_in_threads(family: str) -> None:
    """Replicas and another, bare model run at once, and none disturbs another."""
    model, _ = prefixed(family, reparameterize=True)
    bare = build(family)
    jobs = [(replica(model, {}), run(model, family)) for _ in range(2)] + [
        (model, run(model, family)),
        (bare, run(bare, family)),
    ]
    wrong: list[str] = []
    gate = threading.Barrier(len(jobs))

    def work(job: nn.Module, expected: Tensor) -> None:
        gate.wait()
        for _ in range(8):
            try:
                if not torch.equal(run(job, family), expected):
                    wrong.append("another output")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["bert", "deberta", "t5", "llama"])
def test_an_error_inside_the_attention_leaves_nothing_active(
    family: str, error: type[BaseException]
) -> None:
    bare = build(family)
    plain = run(bare, family)
    model, _ = prefixed(family)
    acting = run(model, family)
    host = next(iter(hosts(model).values()))
    inside = host.get_submodule(PROJECTIONS[family][2])  # after the prefix was entered

    def fail(*args: Any) -> None:
        raise error("inside")

    handle = inside.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(error, match="inside"):
            run(model, family)
        if error is RuntimeError:
            assert _get_current_function_mode() is None
        assert torch.equal(run(bare, family), plain)
    handle.remove()
    assert torch.equal(run(model, family), acting)
    assert torch.equal(run(bare, family), plain)
    assert _get_current_function_mode() is None


def test_the_lookup_is_untouched_outside_of_prefixed_attention() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, _ = prefixed("llama", modified_modules=["0.self_attn"])
    found = []

    def look(*args: Any) -> None:
        found.append(ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None))

    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(look)
    run(model, "llama")
    assert found[1] is ALL_ATTENTION_FUNCTIONS["sdpa"] and found[0] is not found[1]
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert model.config._attn_implementation == "sdpa"


def test_a_prefix_that_the_first_forward_never_reaches_is_named_once() -> None:
    model, _ = prefixed("bert")
    model.encoder.layer[1].forward = lambda hidden, *args, **kwargs: hidden
    with pytest.warns(DeltaWarning, match=r"encoder\.layer\.1\.attention\.prefix") as caught:
        run(model, "bert")
    (message,) = [str(w.message) for w in caught if w.category is DeltaWarning]
    assert "layer.0" not in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, "bert")


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(params=["bert", "t5", "llama"])
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def names_in(folder: Path) -> list[str]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("into", [False, True], ids=["into plain", "into reparameterised"])
@pytest.mark.parametrize("kept", [False, True], ids=["prefixes", "network"])
def test_either_form_is_loaded_whatever_the_config_says(
    family: str, kept: bool, into: bool, tmp_path: Path
) -> None:
    model, delta = prefixed(family, reparameterize=True)
    delta.freeze_module()
    delta.save_finetuned(tmp_path, keep_reparameterization=kept)
    ends = {name.rpartition(".")[2] for name in names_in(tmp_path)}
    assert (ends == {"past_key", "past_value"}) == (not kept)
    assert all(".reparams." in name for name in names_in(tmp_path)) == kept
    fresh = build(family)
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh, reparameterize=into)
    close(run(fresh, family), run(model, family), 1e-6)
    has_network = any("reparams" in name for name, _ in loaded.named_parameters())
    assert has_network == (kept and into) == loaded.config.reparameterize
    on_backbone = {n for n, p in fresh.named_parameters() if getattr(p, "_is_delta", False)}
    assert on_backbone == {n for n, _ in loaded.named_parameters()}


def test_a_plain_prefix_is_saved_as_the_generated_one_is(family: str, tmp_path: Path) -> None:
    _, plain = prefixed(family)
    _, network = prefixed(family, reparameterize=True)
    for delta, folder in ((plain, tmp_path / "plain"), (network, tmp_path / "network")):
        delta.freeze_module()
        delta.save_finetuned(folder)
    names = names_in(tmp_path / "plain")
    assert set(names) == set(names_in(tmp_path / "network")) == set(plain.state_dict())


def test_training_goes_on_after_loading(family: str, tmp_path: Path) -> None:
    """With the network kept, and with the prefixes that it generated."""
    for kept in (True, False):
        _, delta = prefixed(family, reparameterize=True)
        delta.freeze_module()
        delta.save_finetuned(tmp_path / str(kept), keep_reparameterization=kept)
        fresh = build(family)
        loaded = PrefixModel.from_finetuned(tmp_path / str(kept), backbone_model=fresh)
        loaded.freeze_module()
        ends = {n.rpartition(".")[2] for n, p in fresh.named_parameters() if p.requires_grad}
        assert ends == ({"weight", "bias"} if kept else {"past_key", "past_value"})
        output(fresh, family).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in loaded.parameters())
        before = run(fresh, family)
        torch.optim.SGD(loaded.parameters(), lr=1.0).step()
        changed = run(fresh, family)
        assert not torch.equal(changed, before)
        loaded.save_finetuned(tmp_path / "again", keep_reparameterization=kept)
        last = build(family)
        PrefixModel.from_finetuned(tmp_path / "again", backbone_model=last)
        close(run(last, family), changed, 1e-6)
        loaded.detach()
        assert torch.equal(run(fresh, family), run(build(family), family))
        loaded.attach()
        assert torch.equal(run(fresh, family), changed)
        loaded.remove()
        assert str(fresh) == str(build(family))


@pytest.mark.parametrize("kept", [False, True])
def test_checkpoints(family: str, kept: bool, tmp_path: Path) -> None:
    model, delta = prefixed(family, reparameterize=True)
    delta.freeze_module()
    delta.save_checkpoint(tmp_path / "epoch.pt", keep_reparameterization=kept)
    saved = run(model, family)
    for into in (False, True):
        other, target = prefixed(family, reparameterize=into)
        target.load_checkpoint(tmp_path / "epoch.pt")
        close(run(other, family), saved, 1e-6)
        assert any("reparams" in n for n, _ in target.named_parameters()) == (kept and into)
    assert any("reparams" in n for n, _ in delta.named_parameters())  # saving changed nothing
    assert torch.equal(run(model, family), saved)


def test_a_checkpoint_that_does_not_fit_changes_nothing(family: str, tmp_path: Path) -> None:
    _, longer = prefixed(family, prefix_token_num=TOKENS + 1)
    longer.freeze_module()
    longer.save_checkpoint(tmp_path / "longer.pt")
    _, fitting = prefixed(family)
    fitting.freeze_module()
    tensors = {name: p.detach() for name, p in fitting.named_parameters()}
    torch.save({**tensors, "another": torch.zeros(1)}, tmp_path / "another.pt")
    torch.save(dict(list(tensors.items())[1:]), tmp_path / "missing.pt")
    model, delta = prefixed(family, reparameterize=True)
    before, names = run(model, family), [n for n, _ in model.named_parameters()]
    for file in ("longer", "another", "missing"):
        with pytest.raises(CheckpointError):
            delta.load_checkpoint(tmp_path / f"{file}.pt")
        assert torch.equal(run(model, family), before)
        assert [n for n, _ in model.named_parameters()] == names, file


def test_what_is_left_trainable_is_saved_along(tmp_path: Path) -> None:
    model = backbones.build("bert_cls")
    delta = PrefixModel(model, **SMALL)
    randomise(delta)
    delta.freeze_module(exclude=["deltas", "classifier"])
    with torch.no_grad():
        model.classifier.weight.add_(1)
    for kept in (False, True):
        delta.save_finetuned(tmp_path, keep_reparameterization=kept)
        assert {"classifier.weight", "classifier.bias"} <= set(names_in(tmp_path))
        fresh = backbones.build("bert_cls")
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
        close(backbones.run(fresh, "bert_cls"), backbones.run(model, "bert_cls"), 1e-6)


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reparameterize", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama", "deberta", "t5"])
def test_compiled_equals_eager(family: str, reparameterize: bool) -> None:
    torch.compiler.reset()
    model, delta = prefixed(family, reparameterize=reparameterize)
    acting = run(model, family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(output(compiled, family), acting, 1e-5)
    delta.detach()
    close(output(compiled, family), run(build(family), family), 1e-5)
    delta.attach()
    close(output(compiled, family), acting, 1e-5)
    torch.compiler.reset()
