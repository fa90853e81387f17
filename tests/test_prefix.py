"""Prefix tuning: what every attention computes with a prefix, against sums done by hand."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import transformers
import weights
from cases import REENTRANT, output, randomise
from pieces import hook_counts, replicate
from prefixes import (
    DECODERS,
    DEPTH,
    FAMILIES,
    HEADS,
    LOOKED_UP,
    PROJECTIONS,
    SMALL,
    TOKENS,
    OwnAttention,
    OwnNetwork,
    build,
    close,
    hosts,
    prefixed,
    prompt,
    run,
)
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

import opendelta
from opendelta import AdapterModel, AutoDeltaModel, LoraModel, PrefixModel
from opendelta.exceptions import CheckpointError, ConfigError, DeltaWarning, InsertionError

# --- by hand --------------------------------------------------------------------------------------
# What the projections gave and what came to the output projection are watched by hooks; the
# attention between them is summed up here, head by head.


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


@pytest.mark.parametrize("family", ["bert", "deberta", "t5", "llama"])
def test_replicas_in_threads(family: str) -> None:
    """Replicas and another, bare model run at once, and none disturbs another."""
    model, _ = prefixed(family, reparameterize=True)
    bare = build(family)
    jobs = [(replicate(model), run(model, family)) for _ in range(2)] + [
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
    model, delta = prefixed(family)
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
    with delta.detached():
        assert torch.equal(run(model, family), plain)
    assert torch.equal(run(model, family), acting)
    assert torch.equal(run(bare, family), plain)
    assert _get_current_function_mode() is None


@pytest.mark.parametrize("family", ["deberta", "bert"])
@torch.no_grad()
def test_a_prefix_in_float32_on_attention_in_16_bits(family: str) -> None:
    model, delta = prefixed(family)
    model.to(torch.bfloat16)
    in_16_bits = run(model, family)
    delta.float()
    torch.testing.assert_close(run(model, family), in_16_bits, atol=0.05, rtol=0.05)


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
