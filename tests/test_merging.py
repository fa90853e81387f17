"""Merging: what the backbone computes, which bytes it holds, and what is refused."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import transformers
from cases import BACKBONES, FOLDING, METHODS, OWN_LAYERS, built, marked, output, put, randomise
from pieces import Host, forward_hooks
from placed import contents, digest, unchanged
from torch import nn

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaModel,
    BitFitModel,
    DeltaBase,
    IA3Model,
    LoraModel,
)
from opendelta.exceptions import InsertionError

# BitFit can be merged where the backbone has biases of its own.
BIASED = {
    "bert": None,
    "roberta": None,
    "deberta": None,
    "bart": None,
    "vit": None,
    "gpt2": ["attn", "mlp", "ln_1"],
    "opt": ["self_attn", "fc1", "fc2"],
    "mlp": ["first"],
}
MERGEABLE = marked((m, b) for m in FOLDING for b in (BIASED if m == "BitFitModel" else BACKBONES))


def mergeable(method: str, backbone: str, model: nn.Module | None = None) -> DeltaBase:
    """A trained delta that can be merged."""
    model = backbones.build(backbone) if model is None else model
    where = BIASED[backbone] if method == "BitFitModel" else None
    delta = put(method, backbone, model, **({"modified_modules": where} if where else {}))
    randomise(delta)
    return delta


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() < tolerance * max(1, expected.abs().max())


# --- the same function, from the backbone's own weights ------------------------------------------


@pytest.mark.parametrize(("method", "backbone"), MERGEABLE)
def test_merged_computes_the_same_without_hooks_and_keys(method: str, backbone: str) -> None:
    bare = contents(backbones.build(backbone))
    delta = mergeable(method, backbone)
    model = delta.backbone_model
    delta.freeze_module()
    attached, keys = backbones.run(model, backbone), list(model.state_dict())
    parameters = dict(delta.named_parameters())
    trains = {name: p.requires_grad for name, p in parameters.items()}
    assert forward_hooks(model) > 0 or method == "BitFitModel"
    delta.merge(safe=True)
    assert delta.is_merged and not delta.is_attached
    close(backbones.run(model, backbone), attached)
    assert forward_hooks(model) == 0
    assert list(contents(model)) == list(bare)
    assert not any(getattr(p, "_is_delta", False) for p in model.parameters())
    delta.unmerge()
    assert delta.is_attached and not delta.is_merged
    assert torch.equal(backbones.run(model, backbone), attached)
    assert list(model.state_dict()) == keys
    assert {n: (id(p), p.requires_grad) for n, p in delta.named_parameters()} == {
        n: (id(p), trains[n]) for n, p in parameters.items()
    }
    delta.remove()
    assert contents(model) == bare
    assert forward_hooks(model) == 0


def convolution(dimensions: int, groups: int) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return kind(4, 6, (3, 2, 2)[:dimensions], dilation=2, groups=groups, padding_mode="circular")


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda a, b: b @ a),
    "square Conv1D": (lambda: transformers.pytorch_utils.Conv1D(6, 6), lambda a, b: (b @ a).t()),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=1), lambda a, b: (b @ a).t()),
    **{
        f"{dimensions}-d convolution of {groups} groups": (
            lambda d=dimensions, g=groups: convolution(d, g),
            lambda a, b: torch.einsum("or,ri...->oi...", b.flatten(1), a),
        )
        for dimensions, groups in itertools.product((1, 2, 3), (1, 2))
    },
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_weight_is_the_computed_one(kind: str, dtype: torch.dtype) -> None:
    make, product = LAYERS[kind]
    model = Host(make()).to(dtype)
    original = model.layer.weight.detach().clone()
    delta = LoraModel(model, modified_modules=["layer"], lora_r=2, lora_alpha=6, lora_dropout=0.5)
    randomise(delta)
    model.train()  # dropout has no part in what is merged
    delta.merge()
    a, b = (getattr(delta.layer.lora, f"lora_{x}").detach().double() for x in "AB")
    expected = (original.double() + 3 * product(a, b)).to(dtype)
    assert model.layer.weight.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(model.layer.weight, expected, rtol=tolerance, atol=tolerance)
    delta.unmerge()
    assert digest(model.layer.weight) == digest(original)


def test_a_low_precision_weight_is_rounded_once() -> None:
    """Two updates of half a unit in the last place make one; each alone would be rounded away."""
    model = Host(nn.Linear(1, 1, bias=False).to(torch.bfloat16))
    nn.init.ones_(model.layer.weight)
    deltas = [LoraModel(model, modified_modules=["layer"], lora_r=1, lora_alpha=1) for _ in "12"]
    for delta in deltas:
        delta.to(torch.float32)
        nn.init.constant_(delta.layer.lora.lora_A, 2**-8)
        nn.init.ones_(delta.layer.lora.lora_B)
        delta.merge()
    assert model.layer.weight.item() == 1 + 2**-7


# --- together with others ------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("merging", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("unmerging", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_three_loras_merged_and_unmerged_in_any_order(
    backbone: str, merging: tuple[int, ...], unmerging: tuple[int, ...]
) -> None:
    model = backbones.build(backbone)
    deltas = [put("LoraModel", backbone, model, lora_r=r) for r in (1, 2, 3)]
    for delta in deltas:
        randomise(delta, 0.15)
    together = backbones.run(model, backbone)
    for i in merging:
        deltas[i].merge()
        close(backbones.run(model, backbone), together)
    merged = contents(model)
    assert forward_hooks(model) == 0
    for i in unmerging:
        deltas[i].unmerge()
        close(backbones.run(model, backbone), together)
    assert torch.equal(backbones.run(model, backbone), together)
    for i in reversed(merging):
        deltas[i].merge()
    assert contents(model) == merged  # folded in the order of insertion, whatever was merged first


@pytest.mark.parametrize(("method", "backbone"), [(m, b) for m in METHODS for b in ("bert", "t5")])
@pytest.mark.parametrize("attached", [True, False])
def test_other_deltas_act_the_same_beside_a_merged_one(
    method: str, backbone: str, attached: bool
) -> None:
    model = backbones.build(backbone)
    lora = mergeable("LoraModel", backbone, model)
    other = put(method, backbone, model)
    randomise(other, 0.2)
    with_both = backbones.run(model, backbone)
    with other.detached():
        with_lora = backbones.run(model, backbone)
    if not attached:
        other.detach()
    if method == "DoraModel":  # the lengths of the rows would be those of the sum
        with unchanged(model), pytest.raises(InsertionError, match="dora does not act beside"):
            lora.merge()
        return
    lora.merge()
    close(backbones.run(model, backbone), with_both if attached else with_lora)
    (other.detach if attached else other.attach)()
    close(backbones.run(model, backbone), with_lora if attached else with_both)
    if attached:
        other.attach()
    lora.unmerge()
    assert torch.equal(backbones.run(model, backbone), with_both)


def test_what_was_measured_on_a_merged_weight_keeps_it() -> None:
    model = backbones.build("bert")
    lora = mergeable("LoraModel", "bert", model)
    lora.merge()
    dora = mergeable("DoraModel", "bert", model)
    expected = backbones.run(model, "bert")
    with unchanged(model), pytest.raises(InsertionError, match="dora does not act beside"):
        lora.unmerge()
    dora.merge()
    close(backbones.run(model, "bert"), expected)
    dora.unmerge()
    assert torch.equal(backbones.run(model, "bert"), expected)
    dora.remove()
    lora.unmerge()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "DoraModel"])
def test_a_delta_constructed_while_another_is_merged(method: str) -> None:
    reference = backbones.build("bert")
    model = backbones.build("bert")
    first = mergeable("LoraModel", "bert", model)
    first.merge()
    mergeable("LoraModel", "bert", reference)
    for on in (reference, model):
        randomise(put(method, "bert", on), 0.2)
    expected = backbones.run(reference, "bert")
    close(backbones.run(model, "bert"), expected)
    first.unmerge()
    close(backbones.run(model, "bert"), expected)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in reference.named_parameters()
    ]


def test_entries_come_back_in_order_of_insertion() -> None:
    """An adapter between two LoRAs on one module: order matters, and each is where it was."""
    model = Host(nn.Linear(6, 6))
    deltas = [
        LoraModel(model, modified_modules=["layer"], lora_r=2),
        AdapterModel(model, modified_modules=["layer"], bottleneck_dim=3),
        AdapterModel(model, modified_modules=["layer"], bottleneck_dim=4),
    ]
    for delta in deltas:
        randomise(delta, 0.5)
    x = torch.randn(3, 6)
    expected = model(x)
    deltas[0].merge()
    torch.testing.assert_close(model(x), expected)
    deltas[0].unmerge()
    assert torch.equal(model(x), expected)


def test_a_later_bitfit_covers_a_merged_one() -> None:
    model = Host(nn.Linear(4, 4))
    own = model.layer.bias.detach().clone()
    first, second = (BitFitModel(model, modified_modules=["layer"]) for _ in "12")
    nn.init.constant_(first.layer.bias, 1)
    nn.init.constant_(second.layer.bias, 2)
    first.merge()
    assert model.layer.bias.tolist() == [2] * 4
    second.detach()
    assert model.layer.bias.tolist() == [1] * 4
    second.attach()
    first.unmerge()
    second.detach()
    assert model.layer.bias.tolist() == [1] * 4
    first.detach()
    assert torch.equal(model.layer.bias, own)


def test_no_parameter_covers_what_another_kind_is_merged_into() -> None:
    model = Host(nn.Linear(4, 4))
    scale = IA3Model(model, modified_modules=["layer"])
    randomise(scale)
    scale.merge()
    with unchanged(model), pytest.raises(InsertionError, match=r"layer\.bias has a delta merged"):
        BitFitModel(model, modified_modules=["layer"])
    scale.unmerge()
    BitFitModel(model, modified_modules=["layer"]).remove()
    scale.merge()
    with unchanged(model), pytest.raises(InsertionError, match=r"layer\.bias has a delta merged"):
        BitFitModel(model, modified_modules=["layer"])


# --- ties ----------------------------------------------------------------------------------------

TIED = {
    "gpt2": (["lm_head"], "lm_head.weight", "transformer.wte.weight"),
    "opt": (["embed_tokens"], "model.decoder.embed_tokens.weight", "lm_head.weight"),
    "t5": (["lm_head"], "lm_head.weight", "shared.weight"),
}


def tied(backbone: str) -> tuple[nn.Module, DeltaBase]:
    model = backbones.build(backbone)
    delta = LoraModel(model, modified_modules=TIED[backbone][0])
    randomise(delta)
    return model, delta


@pytest.mark.parametrize("backbone", TIED)
def test_a_tied_weight_is_merged_only_if_it_may_be_untied(backbone: str, tmp_path: Path) -> None:
    model, delta = tied(backbone)
    _, merged, other = TIED[backbone]
    with unchanged(model), pytest.raises(InsertionError, match="untie=True") as caught:
        delta.merge()
    assert merged in str(caught.value) and other in str(caught.value)
    attached, bare = backbones.run(model, backbone), digest(model.get_parameter(other))
    shared = model.get_parameter(other)
    delta.merge(untie=True)
    close(backbones.run(model, backbone), attached)
    assert model.config.tie_word_embeddings is False
    assert model.get_parameter(other) is shared and digest(shared) == bare
    assert model.get_parameter(merged) is not shared
    delta.unmerge()
    assert model.config.tie_word_embeddings is True
    assert model.get_parameter(merged) is model.get_parameter(other) is shared
    assert digest(shared) == bare
    assert torch.equal(backbones.run(model, backbone), attached)
    delta.merge_and_remove(untie=True).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    close(backbones.run(loaded, backbone), attached)


def test_a_weight_tied_in_many_places_is_untied_everywhere(tmp_path: Path) -> None:
    """The config has one switch for all ties, so that what stayed tied would not be loaded."""
    torch.manual_seed(0)
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 32, "d_model": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    config = transformers.BartConfig(**sizes, **heads, **layers)
    model: Any = transformers.BartForConditionalGeneration(config).eval()
    places = ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"]
    shared, bare = model.lm_head.weight, digest(model.lm_head.weight)
    first, second = (LoraModel(model, modified_modules=[places[i]]) for i in (3, 1))
    randomise(first)
    randomise(second)
    ids = torch.tensor([[5, 9, 3, 2]])

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = of(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
        return result

    attached = logits(model)
    first.merge(untie=True)
    second.merge(untie=True)
    first.unmerge()
    assert len({id(model.get_submodule(place).weight) for place in places}) == 4
    assert model.config.tie_word_embeddings is False
    close(logits(model), attached)
    second.unmerge()
    assert all(model.get_submodule(place).weight is shared for place in places)
    assert model.config.tie_word_embeddings is True and digest(shared) == bare
    assert torch.equal(logits(model), attached)
    first.merge(untie=True)
    second.merge(untie=True)
    first.merge_and_remove()
    second.merge_and_remove().save_pretrained(tmp_path)
    close(logits(type(model).from_pretrained(tmp_path).eval()), attached)


def test_the_config_is_tied_again_with_the_last_untied_weight() -> None:
    model = backbones.build("gpt2")
    deltas = [LoraModel(model, modified_modules=[name]) for name in ("wte", "lm_head")]
    shared = model.lm_head.weight
    deltas[0].merge(untie=True)
    with unchanged(model), pytest.raises(InsertionError, match="transformer.wte.weight"):
        deltas[1].merge()  # else unmerging the first would tie it to a merged weight
    deltas[1].merge(untie=True)
    deltas[0].unmerge()
    assert model.config.tie_word_embeddings is False
    deltas[1].unmerge()
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.transformer.wte.weight is shared


def test_a_tied_bias_changes_in_all_its_places() -> None:
    model = backbones.build("gpt2")
    model.transformer.h[1].attn.c_proj.bias = model.transformer.h[0].attn.c_proj.bias
    delta = BitFitModel(model, modified_modules=["0.attn.c_proj"])
    randomise(delta)
    attached = backbones.run(model, "gpt2")
    delta.merge()
    assert torch.equal(backbones.run(model, "gpt2"), attached)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(OWN_LAYERS))
def test_a_method_that_cannot_be_merged(method: str) -> None:
    model = backbones.build("bert")
    delta = put(method, "bert", model)
    with unchanged(model):
        for call in (delta.merge, delta.merge_and_remove):
            with pytest.raises(InsertionError, match=f"{method} cannot be merged"):
                call()


def earlier_adapter(model: Any) -> DeltaBase:
    AdapterModel(model, modified_modules=["attention.output.dense"]).detach()
    return LoraModel(model, modified_modules=["attention.output.dense"])


def earlier_bitfit(model: Any) -> DeltaBase:
    BitFitModel(model, modified_modules=["query"]).detach()
    return BitFitModel(model, modified_modules=["query"])


def added_bias(model: Any) -> DeltaBase:
    model.pooler.dense.bias = None
    return BitFitModel(model, modified_modules=["dense"])


def on_meta(model: Any) -> DeltaBase:
    delta = LoraModel(model)
    model.to("meta")
    return delta


def quantised(model: Any) -> DeltaBase:
    delta = LoraModel(model)
    value = model.encoder.layer[1].attention.self.value
    value.weight = nn.Parameter(value.weight.data.to(torch.int8), requires_grad=False)
    return delta


def detached(model: Any) -> DeltaBase:
    delta = LoraModel(model)
    delta.detach(model.encoder.layer[0])
    return delta


def removed(model: Any) -> DeltaBase:
    delta = LoraModel(model)
    delta.remove()
    return delta


def merged(model: Any) -> DeltaBase:
    delta = mergeable("LoraModel", "bert", model)
    delta.merge()
    return delta


def scaled_embedding(model: Any) -> DeltaBase:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    embeddings = model.embeddings
    embeddings.word_embeddings = Scaled(128, 64)
    delta = LoraModel(model, modified_modules=["query", "word_embeddings"])
    randomise(delta)
    return delta


REFUSED = {
    earlier_adapter: "dense.adapter does not act beside a merged 'lora'",
    earlier_bitfit: "query.bias does not act beside a merged 'bias'",
    added_bias: "no parameter pooler.dense.bias",
    on_meta: "on meta",
    quantised: r"1.attention.self.value.weight is a Parameter of torch.int8",
    detached: "attach\\(\\) it",
    removed: "was removed",
    merged: r"unmerge\(\) it first",
    scaled_embedding: r"word_embeddings' \(Scaled\) would not compute",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_merge_that_is_refused_changes_nothing(make: Callable[[Any], DeltaBase]) -> None:
    model = backbones.build("bert")
    delta = make(model)
    if make is on_meta:  # there are no bytes to compare
        with pytest.raises(InsertionError, match=REFUSED[make]):
            delta.merge()
        assert delta.is_attached
        return
    with unchanged(model), pytest.raises(InsertionError, match=REFUSED[make]):
        delta.merge()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_safe_refuses_what_is_not_finite(bad: float) -> None:
    model, delta = built("LoraModel", "bert")
    randomise(delta)
    with torch.no_grad():
        delta.encoder.layer._modules["1"].attention.self.value.lora.lora_B[3, 2] = bad
    with unchanged(model), pytest.raises(InsertionError, match="1.attention.self.value.weight"):
        delta.merge(safe=True)
    delta.merge()
    assert not model.encoder.layer[1].attention.self.value.weight.isfinite().all()
    delta.remove()
    assert contents(model) == contents(backbones.build("bert"))


def test_a_merged_delta_is_not_switched_and_only_a_merged_one_is_unmerged() -> None:
    model, delta = built("LoraModel", "bert")
    with unchanged(model), pytest.raises(InsertionError, match="is not merged"):
        delta.unmerge()
    delta.merge()
    with unchanged(model):
        for call in (delta.attach, delta.detach):
            with pytest.raises(InsertionError, match=r"unmerge\(\) it first"):
                call()
        with pytest.raises(InsertionError, match=r"unmerge\(\)"), delta.detached():
            pass


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["LoraModel", "BitFitModel"])
def test_a_merged_delta_saves_what_it_would_save_attached(method: str, tmp_path: Path) -> None:
    """The classifier is both trained and merged into: the file holds the trained one alone."""
    model = backbones.build("bert_cls")
    where = ["query", "classifier"]
    delta = put(method, "bert", model, modified_modules=where)
    delta.freeze_module(exclude=["deltas", "classifier"])
    randomise(delta)
    attached = backbones.run(model, "bert_cls")
    delta.save_finetuned(tmp_path / "attached")
    plain = opendelta.gen_model_hash(model)
    delta.merge()
    assert opendelta.gen_model_hash(model) == plain
    delta.save_finetuned(tmp_path / "merged")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (
            tmp_path / "attached" / name
        ).read_bytes()
    fresh = backbones.build("bert_cls")
    AutoDeltaModel.from_finetuned(tmp_path / "merged", backbone_model=fresh)
    assert torch.equal(backbones.run(fresh, "bert_cls"), attached)


def test_loading_into_a_merged_delta_folds_it_anew(tmp_path: Path) -> None:
    model, delta = built("LoraModel", "bert")
    delta.freeze_module()
    randomise(delta)
    attached = backbones.run(model, "bert")
    delta.save_checkpoint(tmp_path)
    randomise(delta, 0.1)
    delta.merge()
    delta.load_checkpoint(tmp_path)
    close(backbones.run(model, "bert"), attached)


@pytest.mark.parametrize(
    ("method", "backbone"),
    [("LoraModel", b) for b in ("bert", "gpt2", "t5", "llama")] + [("BitFitModel", "bert")],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_left_is_a_plain_backbone(
    method: str, backbone: str, first: bool, tmp_path: Path
) -> None:
    model = backbones.build(backbone)
    for p in itertools.islice(model.parameters(), 3):
        p.requires_grad_(False)
    state = {name: p.requires_grad for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    delta = mergeable(method, backbone, model)
    delta.freeze_module()
    attached = backbones.run(model, backbone)
    if first:
        delta.merge()
    assert delta.merge_and_remove(safe=True) is model
    close(backbones.run(model, backbone), attached)
    assert opendelta.deltas(model) == [] and list(model.state_dict()) == keys
    assert {name: p.requires_grad for name, p in model.named_parameters()} == state
    for module in model.modules():
        assert not any(value for name, value in vars(module).items() if name.endswith("_hooks"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    close(backbones.run(loaded, backbone), attached)
    with pytest.raises(InsertionError, match="was removed"):
        delta.attach()


def test_one_of_several_merged_for_good() -> None:
    model = backbones.build("bert")
    stays, goes, other = (put("LoraModel", "bert", model, lora_r=r) for r in (1, 2, 3))
    for delta in (stays, goes, other):
        randomise(delta, 0.15)
    all_three = backbones.run(model, "bert")
    with stays.detached(), other.detached():
        goes_alone = backbones.run(model, "bert")
    other.merge()
    goes.merge_and_remove()
    close(backbones.run(model, "bert"), all_three)
    assert opendelta.deltas(model) == [stays, other]
    other.remove()
    stays.remove()
    close(backbones.run(model, "bert"), goes_alone)
    assert forward_hooks(model) == 0


# --- copies, moves, compiled code ----------------------------------------------------------------


@pytest.mark.parametrize(
    "twin_of",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
@pytest.mark.parametrize("method", ["LoraModel", "BitFitModel"])
def test_a_copy_of_a_merged_backbone_unmerges_on_its_own(
    twin_of: Callable[[nn.Module], nn.Module], method: str
) -> None:
    delta = mergeable(method, "bert")
    model = delta.backbone_model
    attached = backbones.run(model, "bert")
    delta.merge()
    merged = contents(model)
    twin = twin_of(model)
    (theirs,) = opendelta.deltas(twin)
    assert theirs.is_merged and contents(twin) == merged
    theirs.unmerge()
    assert torch.equal(backbones.run(twin, "bert"), attached)
    theirs.remove()
    assert contents(twin) == contents(backbones.build("bert"))
    assert contents(model) == merged


@pytest.mark.parametrize("method", ["LoraModel", "BitFitModel"])
def test_originals_follow_a_backbone_that_moved_meanwhile(method: str) -> None:
    delta = mergeable(method, "bert")
    model = delta.backbone_model
    delta.merge()
    merged = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.double()
    delta.unmerge()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    delta.merge()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.float(), merged[name])
    delta.remove()
    assert contents(model) == contents(backbones.build("bert").double())


def test_training_goes_on_after_unmerging() -> None:
    """An optimizer made before merging moves the delta afterwards, through checkpointing too."""
    model, delta = built("LoraModel", "bert")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    delta.freeze_module()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    delta.merge()
    delta.unmerge()
    model.train()
    before = {name: p.detach().clone() for name, p in delta.named_parameters()}
    output(model, "bert").square().mean().backward()
    optimizer.step()
    moved = {n for n, p in delta.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if name.endswith("lora_B")}


def test_compiled_code_follows() -> None:
    torch.compiler.reset()
    model = backbones.build("mlp")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    bare = backbones.run(model, "mlp")
    close(output(compiled, "mlp"), bare)
    delta, other = (mergeable("LoraModel", "mlp", model) for _ in "12")
    with_both = backbones.run(model, "mlp")
    close(output(compiled, "mlp"), with_both)
    delta.merge()
    close(output(compiled, "mlp"), with_both)
    delta.unmerge()
    close(output(compiled, "mlp"), with_both)
    other.remove()
    with_one = backbones.run(model, "mlp")
    assert (with_one - with_both).abs().max() > 1e-3
    close(output(compiled, "mlp"), with_one)
    delta.merge_and_remove()
    close(output(compiled, "mlp"), with_one)
    torch.compiler.reset()


# --- what no forward has reached ------------------------------------------------------------------


class Unread(nn.Module):
    """Calls one linear, and reads the weight of another in a way that no code tells."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)
        self.reads = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x)
        if self.reads:
            return x @ self.get_parameter("read.weight").t()
        out: torch.Tensor = self.get_submodule("read")(x)
        return out


METHODS_ON_LINEARS = [method for method in FOLDING if method != "BitFitModel"]
DEEP = {
    "bert": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "t5": ["SelfAttention.q", "SelfAttention.v"],
}


def unread(method: str) -> tuple[Unread, DeltaBase]:
    torch.manual_seed(0)
    model = Unread().eval()
    delta: DeltaBase = getattr(opendelta, method)(model, modified_modules=["called", "read"])
    randomise(delta)
    return model, delta


@pytest.mark.filterwarnings("ignore:The first forward never called")
@pytest.mark.parametrize("verb", ["merge", "merge_and_remove"])
@pytest.mark.parametrize("method", METHODS_ON_LINEARS)
def test_what_forwards_never_reached_is_not_merged(method: str, verb: str) -> None:
    model, delta = unread(method)
    x = torch.randn(2, 4)
    expected = model(x)
    with unchanged(model), pytest.raises(InsertionError, match="never 'read'") as caught:
        getattr(delta, verb)()
    assert "eval" in str(caught.value) and "exclude_modules" in str(caught.value)
    assert torch.equal(model(x), expected)
    model.reads = False  # a forward that reaches it
    expected = model(x)
    getattr(delta, verb)()
    close(model(x), expected)


@pytest.mark.parametrize("method", METHODS_ON_LINEARS)
def test_before_any_forward_all_is_merged(method: str) -> None:
    _, delta = unread(method)
    delta.merge()
    assert delta.is_merged


@pytest.mark.filterwarnings("ignore:The first forward never called")
@pytest.mark.parametrize("method", METHODS_ON_LINEARS)
def test_forwards_without_it_say_nothing_about_a_delta(method: str) -> None:
    """Those before it came, and those before it was unmerged."""
    model, first = unread(method)
    model(torch.ones(2, 4))
    second: DeltaBase = getattr(opendelta, method)(model, modified_modules=["called", "read"])
    randomise(second)
    first.remove()
    second.merge()
    model(torch.ones(2, 4))
    second.unmerge()
    second.merge()
    second.unmerge()
    model(torch.ones(2, 4))
    with pytest.raises(InsertionError, match="never 'read'"):
        second.merge()


@pytest.mark.parametrize("method", METHODS_ON_LINEARS)
@pytest.mark.parametrize("backbone", DEEP)
def test_the_one_that_no_forward_reached_is_named(method: str, backbone: str) -> None:
    model: Any = backbones.build(backbone)
    delta: DeltaBase = getattr(opendelta, method)(model, modified_modules=DEEP[backbone])
    randomise(delta)
    *reached, last = delta.insertions
    for insertion in reached:
        insertion.host(torch.ones(1, 64))
    with unchanged(model), pytest.raises(InsertionError, match=f"never '{last.host_name}'"):
        delta.merge()
    expected = backbones.run(model, backbone)
    delta.merge()
    close(backbones.run(model, backbone), expected)


def test_what_is_called_in_compiled_code_is_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    delta = LoraModel(model, modified_modules=["0", "1"])
    randomise(delta)
    torch._dynamo.reset()
    model[1].compile(backend="eager")
    x = torch.randn(2, 4)
    expected = model(x)
    delta.merge()
    close(model(x), expected)
    torch._dynamo.reset()


def test_a_parametrized_weight_is_refused_with_its_reason() -> None:
    linear = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(linear, nn.Linear(4, 4))
    delta = LoraModel(model, modified_modules=["[r]^[01]$"])
    with pytest.raises(InsertionError, match="'0' is parametrized .*exclude_modules"):
        delta.merge()


@pytest.mark.parametrize("verb", ["unmerge", "remove"])
def test_a_weight_that_was_resized_while_merged(verb: str) -> None:
    """Unmerging would shrink it again; what is left in for good need not be computed anew."""
    model: Any = backbones.build("llama")
    delta = LoraModel(model, modified_modules=["embed_tokens", "q_proj"])
    randomise(delta)
    delta.merge(untie=True)
    embedding = model.get_input_embeddings()
    model.resize_token_embeddings(embedding.num_embeddings + 4, mean_resizing=False)
    larger = embedding.weight.detach().clone()
    with unchanged(model), pytest.raises(InsertionError, match="merge_and_remove"):
        getattr(delta, verb)()
    delta.merge_and_remove()
    assert torch.equal(embedding.weight, larger) and not opendelta.deltas(model)
