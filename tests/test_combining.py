"""Weighted sums of deltas: the sum of effects for LoRA and BitFit, of parameters elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import transformers
import weights
from cases import OWN_LAYERS, PAIRS, marked, put
from placed import unchanged
from torch import nn

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaModel,
    BitFitModel,
    DeltaBase,
    LoraModel,
    PrefixModel,
    SoftPromptModel,
)
from opendelta.exceptions import ConfigError, InsertionError

WEIGHTS = [0.7, -0.3]


def filled(delta: DeltaBase, tag: str, scale: float = 0.2) -> DeltaBase:
    """The delta with numbers that follow from `tag` and its parameters' names."""
    with torch.no_grad():
        for name, p in delta.named_parameters():
            p.copy_(weights.uniform(f"{tag}:{name}", p.shape, scale))
    return delta


def two(method: str, backbone: str) -> tuple[nn.Module, list[DeltaBase]]:
    """Two deltas of a method on a backbone: the first detached, LoRAs of different ranks."""
    model = backbones.build(backbone)
    ranks = [{"lora_r": r, "lora_alpha": 4} for r in (2, 3)] if method == "LoraModel" else [{}, {}]
    pair = [filled(put(method, backbone, model, **ranks[i]), str(i)) for i in range(2)]
    pair[0].detach()
    return model, pair


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


# DoRA's effect is no sum, and it says so: see test_dora.
SUMMED = [pair for pair in PAIRS if pair[0] != "DoraModel"]

# --- what is summed ------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "backbone"), marked(SUMMED))
def test_nothing_changes_until_the_sum_is_attached(method: str, backbone: str) -> None:
    model, pair = two(method, backbone)
    pair[1].freeze_module()
    before = backbones.run(model, backbone)
    keys = list(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    drawn, held = torch.get_rng_state(), [dict(delta.state_dict()) for delta in pair]
    combined = opendelta.combine(pair, WEIGHTS)
    assert type(combined) is type(pair[0]) and not combined.is_attached
    assert opendelta.deltas(model) == [*pair, combined]
    assert torch.equal(backbones.run(model, backbone), before)
    assert list(model.state_dict()) == keys
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(torch.get_rng_state(), drawn)
    for delta, state in zip(pair, held, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in delta.state_dict().items())
    combined.attach()
    assert not torch.equal(backbones.run(model, backbone), before)
    combined.remove()
    assert torch.equal(backbones.run(model, backbone), before)


@pytest.mark.parametrize(
    ("method", "backbone"), marked(pair for pair in PAIRS if pair[0] in OWN_LAYERS)
)
def test_parameters_are_summed(method: str, backbone: str) -> None:
    _, pair = two(method, backbone)
    one, other = (dict(delta.named_parameters()) for delta in pair)
    combined = dict(opendelta.combine(pair, WEIGHTS).named_parameters())
    assert combined.keys() == one.keys()
    for name, p in combined.items():
        torch.testing.assert_close(p, 0.7 * one[name] - 0.3 * other[name])


@pytest.mark.parametrize("make", [PrefixModel, SoftPromptModel])
def test_prompts_are_summed(make: Any) -> None:
    model = backbones.build("bert")
    pair = [filled(make(model), tag) for tag in "12"]
    combined = dict(opendelta.combine(pair, [0.5, 0.5]).named_parameters())
    one, other = (dict(delta.named_parameters()) for delta in pair)
    for name, p in combined.items():
        torch.testing.assert_close(p, (one[name] + other[name]) / 2)


class Layers(nn.Module):
    """One layer of every kind that LoRA goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.linear = nn.Linear(6, 4)
        self.conv1d = transformers.pytorch_utils.Conv1D(6, 4)
        self.one = nn.Conv1d(6, 4, 3, groups=2, padding=1)
        self.two = nn.Conv2d(4, 4, 3, groups=4)
        self.three = nn.Conv3d(4, 2, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1d(self.linear(self.embedding(ids)))
        hidden = self.one(hidden.transpose(1, 2))
        hidden = self.two(hidden.unsqueeze(-1).expand(*hidden.shape, 5))
        out: torch.Tensor = self.three(hidden.unsqueeze(-1).expand(*hidden.shape, 3))
        return out


def folded(delta: DeltaBase) -> dict[str, torch.Tensor]:
    """The backbone's weights with this delta alone in them, float64."""
    for other in opendelta.deltas(delta.backbone_model):
        other.detach()
    delta.attach()
    delta.merge()
    values = {n: p.detach().double() for n, p in delta.backbone_model.named_parameters()}
    delta.unmerge()
    return values


def test_loras_of_different_ranks_and_modules_sum_exactly() -> None:
    """Each weight moves by the weighted sum of what each LoRA alone moves it by."""
    model = Layers().double()
    bare = {name: p.detach().clone() for name, p in model.named_parameters()}
    everywhere = list(dict(model.named_children()))
    deltas: list[DeltaBase] = [
        LoraModel(model, modified_modules=everywhere, lora_r=2, lora_alpha=3),
        LoraModel(
            model,
            modified_modules=everywhere[:-2],
            lora_r=1,
            rank_pattern={"linear": 3},
            alpha_pattern={"one": 5},
        ),
        LoraModel(model, modified_modules=["two"], lora_r=4),
    ]
    for tag, delta in enumerate(deltas):
        filled(delta, str(tag), 1.0)
    factors = [0.7, -0.3, 1.5]
    alone = [folded(delta) for delta in deltas]
    combined = opendelta.combine(deltas, factors)
    found = folded(combined)
    assert found.keys() == bare.keys()
    for name, own in bare.items():
        moved = sum(w * (each[name] - own) for w, each in zip(factors, alone, strict=True))
        torch.testing.assert_close(found[name], own + moved, rtol=1e-12, atol=1e-12)
    ranks = {name: layer.lora.r for name, layer in combined.named_children()}
    assert ranks == {"embedding": 3, "linear": 5, "conv1d": 3, "one": 3, "two": 6, "three": 2}


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "t5", "llama"])
def test_loras_on_a_backbone_sum_as_attached_together(backbone: str) -> None:
    model, pair = two("LoraModel", backbone)
    pair[0].attach()
    together = backbones.run(model, backbone)
    combined = opendelta.combine(pair, [1, 1])
    for delta in pair:
        delta.detach()
    combined.attach()
    close(backbones.run(model, backbone), together)


@pytest.mark.parametrize("merged", [False, True])
def test_differences_of_biases_are_summed(merged: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.LayerNorm(3))
    own = {"0": model[0].bias.detach().clone(), "1": torch.zeros(3), "2": torch.zeros(3)}
    where = ["0", "2"] if merged else ["0", "1", "2"]
    pair = [filled(BitFitModel(model, modified_modules=where), tag) for tag in "12"]
    one, other = (dict(delta.named_parameters()) for delta in pair)
    if merged:  # what the backbone holds now is no longer its own
        pair[0].merge()
    combined = opendelta.combine(pair, WEIGHTS)
    for name, p in combined.named_parameters():
        base = own[name[0]]
        torch.testing.assert_close(p, base + 0.7 * (one[name] - base) - 0.3 * (other[name] - base))


@pytest.mark.parametrize("method", ["LoraModel", "AdapterModel", "BitFitModel"])
def test_one_delta_of_weight_one_is_a_copy(method: str) -> None:
    model = backbones.build("bert")
    delta = filled(put(method, "bert", model), "1")
    expected = backbones.run(model, "bert")
    combined = opendelta.combine([delta], [1])
    delta.detach()
    combined.attach()
    close(backbones.run(model, "bert"), expected)


def test_a_delta_minus_itself_does_nothing() -> None:
    model, pair = two("LoraModel", "bert")
    pair[1].detach()
    bare = backbones.run(model, "bert")
    opendelta.combine([pair[0], pair[0]], [2, -2]).attach()
    close(backbones.run(model, "bert"), bare)


# --- the sum is a delta like any other ------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "backbone"),
    marked(pair for pair in SUMMED if pair[1] in ("bert", "gpt2", "t5", "mlp")),
)
def test_a_sum_is_saved_and_loaded(method: str, backbone: str, tmp_path: Path) -> None:
    model, pair = two(method, backbone)
    combined = opendelta.combine(pair, WEIGHTS)
    for delta in pair:
        delta.remove()
    combined.attach()
    combined.freeze_module()
    combined.save_finetuned(tmp_path)
    fresh = backbones.build(backbone)
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert torch.equal(backbones.run(fresh, backbone), backbones.run(model, backbone))


def test_a_sum_keeps_the_dtype_of_its_terms() -> None:
    model = nn.Sequential(nn.Linear(4, 4).to(torch.bfloat16))
    pair = [filled(LoraModel(model, modified_modules=["0"], lora_r=1), tag) for tag in "12"]
    for delta in pair:
        delta.to(torch.float32)
    combined = opendelta.combine(pair, WEIGHTS)
    assert {p.dtype for p in combined.parameters()} == {torch.float32}


# --- what does not fit ---------------------------------------------------------------------------


def test_what_cannot_be_combined_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora = LoraModel(model, modified_modules=["0"])
    adapters = [
        AdapterModel(model, modified_modules=["0"], bottleneck_dim=2),
        AdapterModel(model, modified_modules=["0"], bottleneck_dim=3),
        AdapterModel(model, modified_modules=["1"], bottleneck_dim=2),
        AdapterModel(model, modified_modules=["0"], bottleneck_dim=2, non_linearity="relu"),
    ]
    elsewhere = LoraModel(nn.Sequential(nn.Linear(4, 4)), modified_modules=["0"])
    gone = LoraModel(model, modified_modules=["0"])
    gone.remove()
    refused: list[tuple[list[DeltaBase], list[float], type[Exception], str]] = [
        ([], [], ConfigError, "one or more deltas"),
        ([lora], [1.0, 2.0], ConfigError, "1 deltas and 2 weights"),
        ([lora], [float("nan")], ConfigError, "finite"),
        ([lora, adapters[0]], [1, 1], ConfigError, "AdapterModel and LoraModel cannot"),
        ([lora, elsewhere], [1, 1], InsertionError, "different backbones"),
        ([lora, gone], [1, 1], InsertionError, "was removed"),
        (adapters[:2], [1, 1], ConfigError, r"bottleneck_dim differs \(2, 3\)"),
        (adapters[::3], [1, 1], ConfigError, r"non_linearity differs \('gelu_new', 'relu'\)"),
        (adapters[::2], [1, 1], ConfigError, "same modules.*0.adapter"),
    ]
    for deltas, factors, error, message in refused:
        with unchanged(model), pytest.raises(error, match=message):
            opendelta.combine(deltas, factors)
