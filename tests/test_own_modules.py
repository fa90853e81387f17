"""Modules of a delta's own: in their places while it is attached, and nowhere else."""

from __future__ import annotations

import copy
import pickle
import random
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import backbones
import peft
import pytest
import torch
from cases import IMPOSSIBLE, METHODS, marked, put, randomise
from pieces import Host
from placed import contents, place, unchanged
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import opendelta
from opendelta import AutoDeltaModel, BitFitModel, DeltaBase, LoraModel
from opendelta.exceptions import (
    AddressingError,
    CheckpointError,
    ConfigError,
    DeltaWarning,
    InsertionError,
)

# A module of each backbone that is in no method's way.
PLACES = {
    "bert": "pooler.dense",
    "llama": "model.norm",
    "t5": "encoder.final_layer_norm",
    "vit": "pooler",
    "gpt2": "transformer.ln_f",
    "mlp": "last.1",
}


def owning(method: str, backbone: str) -> tuple[nn.Module, DeltaBase]:
    """The method on a backbone with a module of its own, which it leaves alone."""
    return seeded(method, backbone, own_modules=[PLACES[backbone]])


def seeded(method: str, backbone: str, **kwargs: Any) -> tuple[nn.Module, DeltaBase]:
    model = backbones.build(backbone)
    torch.manual_seed(0)
    return model, put(method, backbone, model, **elsewhere(method, backbone), **kwargs)


def elsewhere(method: str, backbone: str) -> dict[str, Any]:
    if backbone == "mlp":
        return {"modified_modules": ["first"] * (1 + (method == "ParallelAdapterModel"))}
    if method == "BitFitModel":
        return {"exclude_modules": [f"[r]^{re.escape(PLACES[backbone])}"]}
    return {}


# All of T5 that is not tied is inside its stacks, on which soft prompts are.
NOWHERE = {*IMPOSSIBLE, ("SoftPromptModel", "t5")}
PAIRS = marked((m, b) for m in METHODS for b in PLACES if (m, b) not in NOWHERE)


def run(model: nn.Module, backbone: str) -> Tensor:
    return backbones.run(model.eval(), backbone)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_it_comes_and_goes_with_its_delta(method: str, backbone: str, tmp_path: Path) -> None:
    plain = backbones.build(backbone)
    bare, names = run(plain, backbone), [*plain.state_dict()]
    place = PLACES[backbone]
    own = {f"{place}.{n}": t for n, t in plain.get_submodule(place).state_dict().items()}
    model, delta = owning(method, backbone)
    original = delta.insertions[-1].child_slot.original
    started = run(model, backbone)
    assert torch.equal(started, run(seeded(method, backbone)[0], backbone))  # a copy of what was
    assert delta.config.own_modules == [place]
    delta.freeze_module()
    train = {name for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() <= train and own.keys() <= dict(delta.named_parameters()).keys()
    assert own.keys() <= model.state_dict().keys()
    randomise(delta)
    tuned = run(model, backbone)
    assert not torch.equal(tuned, started)
    delta.detach()
    assert model.get_submodule(place) is original
    assert not any(p.requires_grad for p in original.parameters())
    assert torch.equal(run(model, backbone), bare)
    delta.attach()
    assert torch.equal(run(model, backbone), tuned)
    delta.save_finetuned(tmp_path)
    assert own.keys() <= load_file(tmp_path / "model.safetensors").keys()

    other = backbones.build(backbone)
    again = AutoDeltaModel.from_finetuned(tmp_path, other)
    for one in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        (its,) = opendelta.deltas(one)
        assert torch.equal(run(one, backbone), tuned)
        its.detach()
        assert torch.equal(run(one, backbone), bare)
        its.attach()
    again.remove()
    assert torch.equal(run(other, backbone), bare) and [*other.state_dict()] == names
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_a_plan_shows_it_and_touches_nothing(method: str, backbone: str) -> None:
    model, arguments = backbones.build(backbone), elsewhere(method, backbone)
    with unchanged(model):
        planned = getattr(opendelta, method).preview(
            model, **arguments, own_modules=[PLACES[backbone]]
        )
    size = sum(p.numel() for p in model.get_submodule(PLACES[backbone]).parameters())
    less = getattr(opendelta, method).preview(model, **arguments)
    assert planned.num_parameters - less.num_parameters == size
    assert PLACES[backbone] in planned.modules and PLACES[backbone] not in less.modules


# --- several heads --------------------------------------------------------------------------------


def heads(model: nn.Module, tmp_path: Path) -> list[DeltaBase]:
    """Three trained deltas: a head that the file carries, one of a delta's own, and a BitFit."""
    folders = []
    for number, make in enumerate((carried, owned, owned_by_bitfit)):
        delta = make()
        randomise(delta, 0.1 * (number + 2))
        delta.save_finetuned(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    made = []
    for folder in folders:
        made.append(AutoDeltaModel.from_finetuned(folder, model))
        made[-1].detach()
    return made


def carried() -> DeltaBase:
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module(exclude=["deltas", "classifier"])
    with torch.no_grad():
        delta.backbone_model.classifier.weight.add_(0.5)
        delta.backbone_model.classifier.bias.sub_(0.25)
    return delta


def owned() -> DeltaBase:
    return LoraModel(backbones.build("bert_cls"), lora_r=3, own_modules=["classifier"])


def owned_by_bitfit() -> DeltaBase:
    model = backbones.build("bert_cls")
    return BitFitModel(model, ["query"], own_modules={"classifier": nn.Linear(backbones.H, 3)})


def test_each_is_as_alone_after_any_switches(tmp_path: Path) -> None:
    model = backbones.build("bert_cls")
    bare = run(model, "bert_cls")
    deltas = heads(model, tmp_path)
    alone = []
    for number in range(3):
        one = backbones.build("bert_cls")
        AutoDeltaModel.from_finetuned(tmp_path / str(number), one)
        alone.append(run(one, "bert_cls"))
    assert all(not torch.equal(a, b) for a, b in zip(alone, [bare, *alone], strict=False))
    chance, on = random.Random(3), None
    for _ in range(20):
        if on is not None:
            deltas[on].detach()
        on = chance.choice([None, 0, 1, 2])
        if on is not None:
            deltas[on].attach()
        assert torch.equal(run(model, "bert_cls"), bare if on is None else alone[on])
    for delta in deltas:
        delta.remove()
    assert torch.equal(run(model, "bert_cls"), bare)


@pytest.mark.parametrize("training", [False, True])
def test_rows_of_one_batch_have_their_own(training: bool, tmp_path: Path) -> None:
    model = backbones.build("bert_cls")
    deltas = heads(model, tmp_path)
    inputs = {n: torch.cat([t, t]) for n, t in backbones.inputs("bert_cls").items()}
    count = len(inputs["input_ids"])
    rows = [*deltas, None] * count
    rows = rows[:count]
    expected: list[Tensor] = []
    for row, delta in enumerate(rows):
        with delta.attached() if delta is not None else nullcontext():
            expected.append(model(**{n: t[row : row + 1] for n, t in inputs.items()}).logits)
    with opendelta.route(model, rows):
        out = model(**inputs).logits
        torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-5)
        if training:
            out.square().sum().backward()
    if training:
        routed = [{n: p.grad.clone() for n, p in d.named_parameters()} for d in deltas]
        for delta in deltas:
            delta.zero_grad()
        torch.cat(expected).square().sum().backward()
        for delta, grads in zip(deltas, routed, strict=True):
            for name, p in delta.named_parameters():
                torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-4)


def test_the_later_of_two_stands_and_heads_of_two_sizes_share_no_batch() -> None:
    model = backbones.build("bert_cls")
    one = LoraModel(model, own_modules=["classifier"])
    other = LoraModel(model, own_modules={"classifier": nn.Linear(backbones.H, 5)})
    assert run(model, "bert_cls").shape[-1] == 5
    other.detach()
    assert run(model, "bert_cls").shape[-1] == 3
    with pytest.raises(InsertionError, match=r"'classifier'.*LoraModel 0.*LoraModel 1"):
        opendelta.route(model, [one, other]).__enter__()
    with pytest.raises(InsertionError, match=r"'classifier'.*LoraModel 0.*bare backbone"):
        opendelta.route(model, [other, None]).__enter__()
    one.remove()
    other.attach()
    assert run(model, "bert_cls").shape[-1] == 5
    other.remove()
    assert torch.equal(run(model, "bert_cls"), run(backbones.build("bert_cls"), "bert_cls"))


# --- sizes ----------------------------------------------------------------------------------------

SIZED: dict[str, tuple[nn.Module, nn.Module]] = {
    "linear": (nn.Linear(4, 3), nn.Linear(4, 6, bias=False)),
    "Conv1D": (Conv1D(3, 4), Conv1D(7, 4)),
    "convolution": (nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 8, 3, groups=2)),
    "embedding": (nn.Embedding(5, 3), nn.Embedding(9, 3)),
    "layer norm": (nn.LayerNorm(4), nn.LayerNorm(6)),
    "batch norm": (nn.BatchNorm2d(4), nn.BatchNorm2d(6)),
    "group norm": (nn.GroupNorm(2, 4), nn.GroupNorm(2, 8)),
}


class Two(nn.Module):
    def __init__(self, place: nn.Module) -> None:
        super().__init__()
        self.line, self.place = nn.Linear(2, 2), copy.deepcopy(place)


@pytest.mark.parametrize("kind", SIZED)
def test_one_of_other_sizes_is_made_from_the_file(kind: str, tmp_path: Path) -> None:
    there, given = SIZED[kind]
    source = Two(there)
    given = copy.deepcopy(given)
    LoraModel(
        source, modified_modules=["line"], lora_r=1, own_modules={"place": given}
    ).save_finetuned(tmp_path)
    model = Two(there)
    AutoDeltaModel.from_finetuned(tmp_path, model)
    made = model.place
    assert type(made) is type(given) and repr(made) == repr(given.eval())
    assert contents(made) == contents(given)


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x).relu())


def test_any_other_is_to_be_given(tmp_path: Path) -> None:
    delta = LoraModel(
        Two(Head(3)), modified_modules=["line"], lora_r=1, own_modules={"place": Head(5)}
    )
    randomise(delta)
    delta.save_finetuned(tmp_path)
    model = Two(Head(3))
    with unchanged(model), pytest.raises(CheckpointError, match=r"own_modules=\{'place': module\}"):
        AutoDeltaModel.from_finetuned(tmp_path, model)
    AutoDeltaModel.from_finetuned(tmp_path, model, own_modules={"place": Head(5)})
    assert contents(model.place) == contents(delta.backbone_model.place.eval())


# --- what is refused ------------------------------------------------------------------------------

BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "nothing": ("bert_cls", {"own_modules": ["classifer"]}, AddressingError, "'classifier'"),
    "no module": ("bert_cls", {"own_modules": {"classifier": 3}}, ConfigError, "own_modules"),
    "one of the backbone": ("bert_cls", {}, InsertionError, "one of the backbone"),
    "a host": ("bert_cls", {"own_modules": ["query"]}, InsertionError, "exclude_modules"),
    "around a host": ("bert_cls", {"own_modules": ["encoder"]}, InsertionError, "query"),
    "in a host": (
        "bert_cls",
        {"own_modules": ["query"], "modified_modules": ["attention.self"]},
        InsertionError,
        "attention.self",
    ),
    "in each other": (
        "bert_cls",
        {"own_modules": ["pooler", "pooler.dense"]},
        InsertionError,
        "inside 'bert.pooler'",
    ),
    "a tied parameter": ("gpt2", {"own_modules": ["lm_head"]}, InsertionError, "tied to 'transf"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_its_own_is_refused(what: str) -> None:
    backbone, arguments, error, words = BAD[what]
    model = backbones.build(backbone)
    if what == "one of the backbone":
        arguments = {"own_modules": {"classifier": model.bert.pooler.dense}}
    with unchanged(model), pytest.raises(error, match=words):
        LoraModel(model, **arguments)


def test_a_file_that_does_not_fit_loads_nothing(tmp_path: Path) -> None:
    owned().save_finetuned(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.weight"] = torch.ones(3, 7)
    save_file(tensors, tmp_path / "other.safetensors")
    model = backbones.build("bert_cls")
    with unchanged(model), pytest.raises(CheckpointError):
        AutoDeltaModel.from_finetuned(
            tmp_path, model, state_dict={n: t for n, t in tensors.items() if "bias" not in n}
        )
    bert = backbones.build("bert")
    with unchanged(bert), pytest.raises(CheckpointError, match=r"'classifier'.*does not have"):
        AutoDeltaModel.from_finetuned(tmp_path, bert, check_hash=False)


# --- with other verbs -----------------------------------------------------------------------------


def test_another_delta_does_not_train_it() -> None:
    model = backbones.build("bert_cls")
    first, second = LoraModel(model, own_modules=["classifier"]), LoraModel(model)
    with unchanged(model), pytest.raises(AddressingError, match="another LoraModel"):
        second.freeze_module(exclude=["deltas", "classifier"])
    first.freeze_module(exclude=["classifier"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }
    first.detach()
    second.freeze_module(exclude=["classifier"])
    assert model.classifier.weight.requires_grad
    assert not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("merges_first", [True, False])
def test_merged_for_good_it_stays(merges_first: bool, tmp_path: Path) -> None:
    model = backbones.build("bert_cls")
    names = [*model.state_dict()]
    delta = LoraModel(model, own_modules=["classifier"])
    randomise(delta)
    tuned = run(model, "bert_cls")
    if merges_first:
        delta.merge()
        assert delta.is_merged and not delta.is_attached
        torch.testing.assert_close(run(model, "bert_cls"), tuned, atol=1e-5, rtol=1e-5)
    delta.merge_and_remove()
    torch.testing.assert_close(run(model, "bert_cls"), tuned, atol=1e-5, rtol=1e-5)
    assert opendelta.deltas(model) == [] and [*model.state_dict()] == names
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(run(again, "bert_cls"), tuned, atol=1e-5, rtol=1e-5)
    LoraModel(model, own_modules=["classifier"]).remove()
    torch.testing.assert_close(run(model, "bert_cls"), tuned, atol=1e-5, rtol=1e-5)


def test_unmerging_leaves_it_too() -> None:
    model = backbones.build("bert_cls")
    delta = LoraModel(model, own_modules=["classifier"])
    randomise(delta)
    bare, tuned = run(backbones.build("bert_cls"), "bert_cls"), run(model, "bert_cls")
    delta.merge()
    delta.unmerge()
    assert torch.equal(run(model, "bert_cls"), tuned)
    delta.merge()
    delta.remove()
    assert torch.equal(run(model, "bert_cls"), bare)


def test_a_sum_has_that_of_the_only_one(tmp_path: Path) -> None:
    model = backbones.build("bert_cls")
    owner, other = LoraModel(model, own_modules=["classifier"]), LoraModel(model, lora_r=2)
    for number, delta in enumerate((owner, other)):
        randomise(delta, 0.1 * (number + 1))
    both = run(model, "bert_cls")
    total = opendelta.combine([other, owner], weights=[1.0, 1.0])
    owner.remove()
    other.remove()
    total.attach()
    torch.testing.assert_close(run(model, "bert_cls"), both, atol=1e-5, rtol=1e-5)
    total.save_finetuned(tmp_path)
    again = backbones.build("bert_cls")
    AutoDeltaModel.from_finetuned(tmp_path, again)
    assert torch.equal(run(again, "bert_cls"), run(model, "bert_cls"))


def test_a_sum_takes_what_a_file_carried_along_and_two_heads_are_refused(tmp_path: Path) -> None:
    model = backbones.build("bert_cls")
    first, second, _ = heads(model, tmp_path)
    other = LoraModel(model, lora_r=2)
    randomise(other, 0.1)
    first.attach()
    both = run(model, "bert_cls")
    total = opendelta.combine([first, other], weights=[1.0, 1.0])
    first.detach()
    other.detach()
    total.attach()
    torch.testing.assert_close(run(model, "bert_cls"), both, atol=1e-5, rtol=1e-5)
    total.detach()
    with unchanged(model), pytest.raises(ConfigError, match="modules of their own"):
        opendelta.combine([first, second], weights=[1.0, 1.0])


def test_a_module_that_another_delta_modifies_is_refused() -> None:
    """What acts on the one would not act on the other."""
    model = Host(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    inner = LoraModel(model, modified_modules=["layer.1"], lora_r=2)
    more = {"modified_modules": ["layer.0"], "lora_r": 1}
    with unchanged(model), pytest.raises(InsertionError, match="another LoraModel modifies"):
        LoraModel(model, **more, own_modules=["layer.1"])
    inner.remove()
    LoraModel(model, **more, own_modules=["layer.1"])
    with unchanged(model), pytest.raises(AddressingError, match="in whose place"):
        LoraModel(model, modified_modules=["layer.1"])


class Int8Linear(nn.Module):
    """A linear that is stored as codes and scales, as quantisers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_of_a_quantised_module_it_is_a_dense_copy() -> None:
    torch.manual_seed(0)
    model = Host(nn.Sequential(nn.Linear(8, 8), Int8Linear(nn.Linear(8, 8))))
    x = torch.randn(3, 8)
    bare = model(x)
    with pytest.warns(DeltaWarning, match="dense copy"):
        delta = LoraModel(model, modified_modules=["layer.0"], own_modules=["layer.1"])
    torch.testing.assert_close(model(x), bare, atol=1e-6, rtol=1e-5)
    assert type(model.layer[1]) is nn.Linear and model.layer[1].weight.requires_grad
    model(x).sum().backward()
    assert model.layer[1].weight.grad is not None
    delta.remove()
    assert torch.equal(model(x), bare)


# --- PEFT -----------------------------------------------------------------------------------------


def test_two_files_of_peft_with_heads_on_one_backbone(tmp_path: Path) -> None:
    expected = []
    for number in range(2):
        base = backbones.build("bert_cls")
        torch.manual_seed(number)
        config = peft.LoraConfig(
            r=2, target_modules=["query"], modules_to_save=["classifier", "classifier"]
        )
        theirs = peft.get_peft_model(base, config)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
        expected.append(run(theirs, "bert_cls"))
        theirs.save_pretrained(tmp_path / str(number))
    model = backbones.build("bert_cls")
    bare = run(model, "bert_cls")
    deltas = []
    for number in range(2):
        deltas.append(AutoDeltaModel.from_peft(tmp_path / str(number), model))
        assert deltas[-1].config.own_modules == ["classifier"]
        deltas[-1].detach()
    for number in (0, 1, 0):
        with deltas[number].attached():
            torch.testing.assert_close(
                run(model, "bert_cls"), expected[number], atol=1e-6, rtol=1e-6
            )
    assert torch.equal(run(model, "bert_cls"), bare)
    deltas[1].attach()
    deltas[1].export_peft(tmp_path / "out")
    back = peft.PeftModel.from_pretrained(backbones.build("bert_cls"), tmp_path / "out")
    assert back.peft_config["default"].modules_to_save == ["classifier"]
    torch.testing.assert_close(run(back, "bert_cls"), expected[1], atol=1e-6, rtol=1e-6)
