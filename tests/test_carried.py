"""What a file carries of the backbone is the delta's: it comes, acts and goes with it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import FOLDING
from placed import PLACED_METHODS, TARGETS, contents, trainable, unchanged
from safetensors.torch import load_file
from saved import loaded, trained
from torch import Tensor, nn

import opendelta
from opendelta import AutoDeltaModel, DeltaBase, LoraModel
from opendelta.exceptions import AddressingError, CheckpointError

# What is left trainable of each backbone besides the deltas: a head, a norm, a tied embedding.
LEFT = {"bert_cls": "classifier", "llama": "model.norm", "gpt2": "wte", "mlp": "last.1"}
PAIRS = [(m, b) for m in PLACED_METHODS for b in LEFT if b in TARGETS[m]]


def run(model: nn.Module, backbone: str) -> Tensor:
    return backbones.run(model.eval(), backbone)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_it_comes_and_goes_with_its_delta(method: str, backbone: str, tmp_path: Path) -> None:
    plain = backbones.build(backbone)
    bare, before = run(plain, backbone), contents(plain)
    delta = trained(method, backbone, exclude=["deltas", LEFT[backbone]])
    tuned = run(delta.backbone_model, backbone)
    delta.save_finetuned(tmp_path / "one")
    carried = load_file(tmp_path / "one" / "model.safetensors").keys() & before.keys()
    assert carried

    again = loaded(tmp_path / "one", backbone)
    model = again.backbone_model
    assert torch.equal(run(model, backbone), tuned)
    names = dict(again.named_parameters())
    assert carried <= names.keys()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (its,) = opendelta.deltas(one)
        its.detach()
        assert torch.equal(run(one, backbone), bare)
        its.attach()
        assert torch.equal(run(one, backbone), tuned)
    again.freeze_module()
    assert carried <= trainable(model)
    again.freeze_module(exclude=["nothing of it", "lora_A"] if method == "LoraModel" else [again])
    again.save_finetuned(tmp_path / "two")  # frozen or not
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    again.remove()
    assert torch.equal(run(model, backbone), bare) and contents(model) == before
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(run(loaded(tmp_path / "two", backbone).backbone_model, backbone), tuned)


@pytest.mark.parametrize("method", FOLDING)
def test_merged_for_good_it_stays(method: str, tmp_path: Path) -> None:
    delta = trained(method, "bert_cls", exclude=["deltas", "classifier"])
    tuned = run(delta.backbone_model, "bert_cls")
    delta.save_finetuned(tmp_path)
    again = loaded(tmp_path, "bert_cls")
    model = again.backbone_model
    again.merge()
    torch.testing.assert_close(run(model, "bert_cls"), tuned, atol=1e-5, rtol=1e-5)
    again.unmerge()
    assert torch.equal(run(model, "bert_cls"), tuned)
    again.merge_and_remove()
    torch.testing.assert_close(run(model, "bert_cls"), tuned, atol=1e-5, rtol=1e-5)
    assert contents(model).keys() == contents(backbones.build("bert_cls")).keys()


def test_where_it_was_trained_it_stays() -> None:
    delta = trained("LoraModel", "bert_cls", exclude=["deltas", "classifier"])
    model = delta.backbone_model
    weight = model.classifier.weight.detach().clone()
    for leave in (delta.detach, delta.attach, delta.remove):
        leave()
        assert torch.equal(model.classifier.weight, weight)


def test_several_in_one_place() -> None:
    """Where two are attached the later one's values stand, as with hooks."""
    made: list[Any] = []
    model = backbones.build("bert_cls")
    own = model.classifier.weight.detach().clone()
    for value in (1.0, 2.0):
        source = LoraModel(backbones.build("bert_cls"))
        source.freeze_module(exclude=["deltas", "classifier"])
        nn.init.constant_(source.backbone_model.classifier.weight, value)
        tensors = source.checkpoint_tensors()
        made.append(LoraModel.from_finetuned(None, model, source.config, state_dict=tensors))

    def stands() -> float:
        return float(model.classifier.weight.unique().item())

    first, second = made
    assert stands() == 2
    second.detach()
    assert stands() == 1
    first.detach()
    assert torch.equal(model.classifier.weight, own)
    second.attach()
    first.attach()
    assert stands() == 2
    with unchanged(model), pytest.raises(AddressingError, match="another LoraModel"):
        first.freeze_module(exclude=["deltas", "classifier"])
    second.remove()
    assert stands() == 1
    first.freeze_module(exclude=["classifier"])
    assert trainable(model) == {"classifier.weight", "classifier.bias"}


# --- training on ----------------------------------------------------------------------------------


def test_what_was_excluded_is_excluded_again(tmp_path: Path) -> None:
    delta = LoraModel(backbones.build("bert_cls"))
    delta.freeze_module(exclude=[delta, "classifier"])
    assert delta.config.unfrozen_modules == delta.unfrozen_modules == ["deltas", "classifier"]
    delta.freeze_module(delta.backbone_model.bert, exclude=["pooler"])  # a part says nothing
    assert delta.config.unfrozen_modules == ["deltas", "classifier"]
    delta.save_finetuned(tmp_path)
    config = AutoDeltaModel.from_finetuned(tmp_path, backbones.build("bert_cls")).config
    assert config.unfrozen_modules == ["deltas", "classifier"]


@pytest.mark.parametrize("says", [["deltas"], ["deltas", "classifier"]])
def test_days_of_training(says: list[str], tmp_path: Path) -> None:
    """Also with files of 1.0, whose config says that the deltas alone train."""
    delta = trained("LoraModel", "bert_cls", exclude=["deltas", "classifier"])
    delta.save_finetuned(tmp_path / "0")
    for day in range(2):
        model = backbones.build("bert_cls")
        delta = AutoDeltaModel.from_finetuned(tmp_path / str(day), model, unfrozen_modules=says)
        delta.freeze_module()
        model.train()
        before = model.classifier.weight.detach().clone()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model(**backbones.inputs("bert_cls")).logits.square().sum().backward()
        optimizer.step()
        assert not torch.equal(model.classifier.weight, before)
        tuned = run(model, "bert_cls")
        delta.save_finetuned(tmp_path / str(day + 1))
    assert torch.equal(run(loaded(tmp_path / "2", "bert_cls").backbone_model, "bert_cls"), tuned)


@pytest.mark.parametrize("attached", [True, False])
def test_loading_into_a_delta_that_trains_it(attached: bool, tmp_path: Path) -> None:
    """What an optimizer holds stays what trains; what stood there before is the backbone's."""
    source = trained("LoraModel", "bert_cls", exclude=["deltas", "classifier"])
    source.save_finetuned(tmp_path)
    delta = LoraModel(backbones.build("bert_cls"))
    model: Any = delta.backbone_model
    delta.freeze_module(exclude=["deltas", "classifier"])
    nn.init.constant_(model.classifier.weight, 3.0)
    held = model.classifier.weight
    if not attached:
        delta.detach()
    delta.load_checkpoint(tmp_path)
    if attached:
        assert model.classifier.weight is held and held.requires_grad
    else:
        assert model.classifier.weight.unique().tolist() == [3.0]
        delta.attach()
    expected = source.backbone_model.classifier.weight
    assert torch.equal(model.classifier.weight, expected)
    assert torch.equal(run(model, "bert_cls"), run(source.backbone_model, "bert_cls"))
    delta.detach()
    assert model.classifier.weight.unique().tolist() == [3.0]
    delta.attach()
    assert torch.equal(model.classifier.weight, expected)
    delta.load_checkpoint(tmp_path)  # once more, into what it has
    assert [n for n, _ in delta.named_parameters()].count("classifier.weight") == 1


def test_a_merged_delta_takes_nothing_over(tmp_path: Path) -> None:
    trained("LoraModel", "bert_cls", exclude=["deltas", "classifier"]).save_finetuned(tmp_path)
    model = backbones.build("bert_cls")
    delta = LoraModel(model)
    delta.merge()
    with unchanged(model), pytest.raises(CheckpointError, match=r"unmerge\(\) it first"):
        delta.load_checkpoint(tmp_path)


# --- rows of a batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [b for b in LEFT if b != "mlp"])
def test_rows_of_one_batch_have_their_own(backbone: str, tmp_path: Path) -> None:
    model, deltas = backbones.build(backbone), list[DeltaBase]()
    for number in range(2):
        source = LoraModel(backbones.build(backbone), lora_r=number + 1)
        source.freeze_module(exclude=["deltas", LEFT[backbone]])
        with torch.no_grad():
            for _, p in source.backbone_model.named_parameters():
                if p.requires_grad:
                    p.add_(0.1 * (number + 1))
        source.save_finetuned(tmp_path / str(number))
        deltas.append(AutoDeltaModel.from_finetuned(tmp_path / str(number), model))
        deltas[-1].detach()
    inputs = backbones.inputs(backbone)
    rows = [deltas[0], None, deltas[1], deltas[0]]
    index = torch.tensor([0, 1, 0, 1])
    batch = {n: t[index] for n, t in inputs.items()}
    alone = []
    for row, delta in enumerate(rows):
        if delta is not None:
            delta.attach()
        alone.append(model(**{n: t[row : row + 1] for n, t in batch.items()}).logits)
        if delta is not None:
            delta.detach()
    with opendelta.route(model, rows):
        mixed = model(**batch).logits
    torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-5, rtol=1e-5)
