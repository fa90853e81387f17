"""Soft prompts that a network generates while they are trained (P-tuning)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import torch.nn.functional as F
import transformers
from cases import randomise
from prompts import COUNT, SIZES, build, close, first, run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import opendelta
from opendelta import AutoDeltaModel, SoftPromptModel
from opendelta.exceptions import CheckpointError, ConfigError

each_kind = pytest.mark.parametrize("kind", ["mlp", "lstm"])
each_family = pytest.mark.parametrize("family", ["bert", "t5", "llama"])
KEY = "soft_prompt_layer.soft_embeds"


def made(family: str, kind: str, **options: Any) -> tuple[nn.Module, SoftPromptModel]:
    model = build(family)
    delta = SoftPromptModel(model, COUNT, reparameterize=kind, mid_dim=8, **options)
    randomise(delta, 0.3)
    delta.freeze_module()
    return model, delta


def by_hand(delta: SoftPromptModel, kind: str) -> Tensor:
    """The prompt, from the network's parameters."""
    p = {name.partition("network.")[2]: value for name, value in delta.named_parameters()}
    x = p["embedding.weight"]
    if kind == "mlp":
        for number in (0, 2):
            x = F.relu(F.linear(x, p[f"mlp.{number}.weight"], p[f"mlp.{number}.bias"]))
        return F.linear(x, p["mlp.4.weight"], p["mlp.4.bias"])
    lstm = nn.LSTM(x.shape[1], 8, 2, batch_first=True, bidirectional=True)
    lstm.load_state_dict({n.removeprefix("lstm."): v for n, v in p.items() if "lstm." in n})
    x = F.relu(F.linear(lstm(x[None])[0][0], p["mlp.0.weight"], p["mlp.0.bias"]))
    return F.linear(x, p["mlp.2.weight"], p["mlp.2.bias"])


@pytest.mark.parametrize(("kind", "trained"), [(False, 128), ("mlp", 1472), ("lstm", 15040)])
def test_as_many_parameters_as_in_peft(kind: Any, trained: int) -> None:
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    delta = SoftPromptModel(model, 4, reparameterize=kind, mid_dim=16)
    assert sum(p.numel() for p in delta.parameters()) == trained


@each_kind
@each_family
def test_it_is_trained_and_saved_without_the_network(
    family: str, kind: str, tmp_path: Path
) -> None:
    model, delta = made(family, kind)
    output = run(model, family)
    plain = build(family)
    other = SoftPromptModel(plain, COUNT)
    with torch.no_grad():
        next(other.parameters()).copy_(by_hand(delta, kind))
    close(run(plain, family), output)

    result = first(model(**backbones.inputs(family)))
    result.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in delta.parameters())

    delta.save_finetuned(tmp_path)
    (name,) = (saved := load_file(tmp_path / "model.safetensors"))
    assert name.endswith(KEY)
    close(saved[name], by_hand(delta, kind))
    fresh = build(family)
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert loaded.reparameterize is False and len([*loaded.parameters()]) == 1
    close(run(fresh, family), output)
    loaded.freeze_module()
    assert all(p.requires_grad for p in loaded.parameters())


@each_kind
@each_family
def test_it_is_saved_to_train_on(family: str, kind: str, tmp_path: Path) -> None:
    model, delta = made(family, kind)
    output = run(model, family)
    delta.save_finetuned(tmp_path, keep_reparameterization=True)
    fresh = build(family)
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert loaded.reparameterize == kind
    for mine, saved in zip(loaded.parameters(), delta.parameters(), strict=True):
        assert torch.equal(mine, saved)
    assert torch.equal(run(fresh, family), output)
    without = build(family)
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=without, reparameterize=False)
    close(run(without, family), output)


@each_kind
def test_a_prompt_is_loaded_into_a_delta_with_a_network(kind: str, tmp_path: Path) -> None:
    plain = build("bert")
    source = SoftPromptModel(plain, COUNT)
    randomise(source, 1.0)
    source.freeze_module()
    source.save_checkpoint(tmp_path / "x.safetensors")
    model, delta = made("bert", kind)
    delta.load_checkpoint(tmp_path / "x.safetensors")
    assert torch.equal(run(model, "bert"), run(plain, "bert"))
    assert [name for name, _ in delta.named_parameters()] == [KEY]


def test_a_network_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    _, delta = made("bert", "mlp")
    delta.save_finetuned(tmp_path, keep_reparameterization=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["soft_prompt_layer.network.mlp.2.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    other = SoftPromptModel(build("bert"), COUNT)
    other.freeze_module()
    with pytest.raises(CheckpointError, match="not whole"):
        other.load_checkpoint(tmp_path / "part.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reparameterize": "gru"}, "'mlp' or 'lstm'"),
        ({"reparameterize": "mlp", "mid_dim": 0}, "mid"),
    ],
)
def test_networks_that_are_none(options: dict[str, Any], words: str) -> None:
    model = build("bert")
    with pytest.raises(ConfigError, match=words):
        SoftPromptModel(model, COUNT, **options)
    assert not opendelta.deltas(model)


def test_a_network_that_is_not_there_cannot_be_kept(tmp_path: Path) -> None:
    delta = SoftPromptModel(build("bert"), COUNT)
    delta.freeze_module()
    with pytest.raises(ConfigError, match="no network"):
        delta.save_finetuned(tmp_path / "x", keep_reparameterization=True)
    assert not (tmp_path / "x").exists()
