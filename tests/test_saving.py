"""Files of deltas: what is in them, who reads them, and what is kept from harm."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import built, randomise
from pieces import part_and_whole
from placed import PLACED, PLACED_METHODS, place, told, trainable, unchanged
from safetensors.torch import load_file, save_file
from saved import content, loaded, names, output, trained
from torch import Tensor, nn

import opendelta
from opendelta import (
    AdapterConfig,
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    DeltaBase,
    DeltaWarning,
    LoraConfig,
    LoraModel,
    OpenDeltaError,
    ParallelAdapterModel,
)
from opendelta.exceptions import CheckpointError

each_method = pytest.mark.parametrize("method", PLACED_METHODS)
placed = pytest.mark.parametrize(("method", "backbone"), PLACED)
CLASSIFIER = {"classifier.weight", "classifier.bias"}


# --- two files ------------------------------------------------------------------------------------


@placed
def test_safetensors_by_default(method: str, backbone: str, tmp_path: Path) -> None:
    delta = trained(method, backbone)
    delta.save_finetuned(tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert set(content(folder)) == {"config.json", "model.safetensors"}
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == names(delta)
    assert all(torch.equal(tensors[name], p) for name, p in delta.named_parameters())
    again = loaded(folder, backbone)
    assert torch.equal(output(again, backbone), output(delta, backbone))


@placed
def test_torch_save_writes_what_0_3_2_did(method: str, backbone: str, tmp_path: Path) -> None:
    delta = trained(method, backbone)
    delta.save_finetuned(tmp_path, save_function=torch.save)
    assert set(content(tmp_path)) == {"config.json", "pytorch_model.bin"}
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(tensors) == names(delta)
    again = loaded(tmp_path, backbone)
    assert torch.equal(output(again, backbone), output(delta, backbone))


def test_the_last_save_is_what_loads_whatever_its_format(tmp_path: Path) -> None:
    for save_function in (None, torch.save, None):
        delta = trained("LoraModel", "mlp")
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(torch.rand(()))
        delta.save_finetuned(tmp_path, save_function=save_function)
        assert torch.equal(output(loaded(tmp_path, "mlp"), "mlp"), output(delta, "mlp"))


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    delta = trained("LoraModel", "mlp")
    for path in ((), (None,)):
        delta.save_finetuned(*path)
        assert set(content(tmp_path / "delta_checkpoints")) == {"config.json", "model.safetensors"}
        (tmp_path / "delta_checkpoints" / "model.safetensors").unlink()
    delta.save_finetuned("relative/text")
    assert (tmp_path / "relative" / "text" / "config.json").is_file()


@pytest.mark.parametrize("argument", [{"save_config": False}, {"state_dict_only": True}])
def test_weights_without_config(argument: dict[str, bool], tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp")
    delta.save_finetuned(tmp_path, **argument)
    assert set(content(tmp_path)) == {"model.safetensors"}
    again = LoraModel.from_finetuned(tmp_path, backbones.build("mlp"), delta_config=delta.config)
    assert torch.equal(output(again, "mlp"), output(delta, "mlp"))


def test_a_state_dict_of_ones_own_is_saved_as_given(tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp")
    doubled = {name: 2 * p.detach() for name, p in delta.named_parameters()}
    delta.save_finetuned(tmp_path, state_dict=doubled)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == doubled.keys()
    assert all(torch.equal(saved[name], doubled[name]) for name in doubled)
    again = loaded(tmp_path, "mlp")
    assert all(torch.equal(p, doubled[name]) for name, p in again.named_parameters())


def test_a_save_function_of_ones_own_gets_tensors_and_path(tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp")
    seen: list[set[str]] = []

    def save(tensors: dict[str, torch.Tensor], path: str) -> None:
        seen.append(set(tensors))
        assert not any(t.requires_grad for t in tensors.values())
        torch.save(tensors, path)

    delta.save_finetuned(tmp_path, save_function=save)
    assert seen == [names(delta)]
    assert torch.equal(output(loaded(tmp_path, "mlp"), "mlp"), output(delta, "mlp"))


def test_the_config_records_the_weights_sha256(tmp_path: Path) -> None:
    for save_function, file in ((None, "model.safetensors"), (torch.save, "pytorch_model.bin")):
        trained("LoraModel", "mlp").save_finetuned(tmp_path, save_function=save_function)
        config = json.loads((tmp_path / "config.json").read_text())
        expected = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
        assert config["weights_sha256"] == expected


def test_the_config_says_what_the_delta_is_and_where_it_was(tmp_path: Path) -> None:
    delta = trained("LoraModel", "bert_cls", exclude=["deltas", "classifier"], lora_r=3)
    delta.backbone_model.config._name_or_path = "some/bert"
    delta.save_finetuned(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["delta_type"] == "lora"
    assert config["lora_r"] == 3
    assert config["modified_modules"] == ["query", "value"]
    assert config["backbone_class"] == "BertForSequenceClassification"
    assert config["backbone_checkpoint_name"] == "some/bert"
    assert set(config["backbone_hash_excludes"]) == CLASSIFIER
    assert config["opendelta_version"] == opendelta.__version__
    assert AutoDeltaConfig.from_finetuned(tmp_path) == delta.config


def test_saving_changes_nothing_about_the_backbone(tmp_path: Path) -> None:
    for method in PLACED_METHODS:
        delta = trained(method, "bert_cls", exclude=["deltas", "classifier"])
        with unchanged(delta.backbone_model):
            delta.save_finetuned(tmp_path / method)
            delta.save_checkpoint(tmp_path / method / "other.bin")


def test_a_small_file(tmp_path: Path) -> None:
    """Of the size of the delta, not of the backbone."""
    delta = trained("LoraModel", "bert_cls", lora_r=1)
    delta.save_finetuned(tmp_path)
    size = sum(p.numel() * p.element_size() for p in delta.parameters())
    whole = sum(p.numel() * p.element_size() for p in delta.backbone_model.parameters())
    assert size < (tmp_path / "model.safetensors").stat().st_size < size + 5000 < whole


# --- what is in the file --------------------------------------------------------------------------


@each_method
def test_a_frozen_delta_is_saved_all_the_same(method: str, tmp_path: Path) -> None:
    delta = trained(method, "bert_cls", exclude=["classifier"])
    assert trainable(delta.backbone_model) == CLASSIFIER
    delta.save_finetuned(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names(delta) | CLASSIFIER
    assert torch.equal(output(loaded(tmp_path, "bert_cls"), "bert_cls"), output(delta, "bert_cls"))


@each_method
def test_a_detached_delta_is_saved_all_the_same(method: str, tmp_path: Path) -> None:
    delta = trained(method, "bert_cls", exclude=["deltas", "classifier"])
    expected = output(delta, "bert_cls")
    delta.detach()
    delta.save_finetuned(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names(delta) | CLASSIFIER
    assert torch.equal(output(loaded(tmp_path, "bert_cls"), "bert_cls"), expected)


@each_method
@pytest.mark.parametrize("how", ["exclude", "unfrozen_modules"])
def test_what_was_left_trainable_is_saved_and_loaded(method: str, how: str, tmp_path: Path) -> None:
    patterns = ["deltas", "classifier", "1.output"]
    arguments: dict[str, Any] = {how: patterns}
    delta = trained(method, "bert_cls", **arguments)
    delta.save_finetuned(tmp_path)
    own = trainable(delta.backbone_model) - names(delta)
    assert own > CLASSIFIER and any("layer.1.output.dense.weight" in name for name in own)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == names(delta) | own
    config = json.loads((tmp_path / "config.json").read_text())
    assert own <= set(config["backbone_hash_excludes"]) <= set(saved)
    again = loaded(tmp_path, "bert_cls")
    assert torch.equal(output(again, "bert_cls"), output(delta, "bert_cls"))
    for name in own:
        assert torch.equal(again.backbone_model.get_parameter(name), saved[name])


def test_the_last_freeze_decides(tmp_path: Path) -> None:
    delta = trained("LoraModel", "bert_cls", exclude=["deltas", "pooler"])
    delta.freeze_module(exclude=["deltas", "classifier"])
    delta.save_finetuned(tmp_path / "one")
    assert set(load_file(tmp_path / "one" / "model.safetensors")) == names(delta) | CLASSIFIER
    delta = trained("LoraModel", "bert_cls", unfrozen_modules=["deltas", "classifier"])
    delta.freeze_module(exclude=["deltas"])
    delta.save_finetuned(tmp_path / "two")
    assert set(load_file(tmp_path / "two" / "model.safetensors")) == names(delta)


def test_parts_frozen_one_by_one_are_all_saved(tmp_path: Path) -> None:
    delta = trained("LoraModel", "bert_cls")
    model = delta.backbone_model
    delta.freeze_module(model.bert, exclude=["deltas", "pooler.dense.bias"])
    delta.freeze_module(model.classifier, exclude=["classifier"])
    delta.save_finetuned(tmp_path)
    expected = names(delta) | CLASSIFIER | {"bert.pooler.dense.bias"}
    assert trainable(model) == expected
    assert set(load_file(tmp_path / "model.safetensors")) == expected


def test_what_trains_by_other_means_is_not_saved(tmp_path: Path) -> None:
    """The list is the last freeze's; requires_grad may be changed for a moment."""
    delta = trained("LoraModel", "bert_cls", exclude=["deltas", "classifier"])
    delta.backbone_model.requires_grad_(True)
    delta.save_finetuned(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names(delta) | CLASSIFIER


@each_method
def test_without_a_freeze_only_the_delta_and_unfrozen_modules_with_a_warning(
    method: str, tmp_path: Path
) -> None:
    for unfrozen, own in ((None, set()), (["deltas", "classifier"], CLASSIFIER)):
        delta = place(method, "bert_cls", unfrozen_modules=unfrozen)
        assert len(trainable(delta.backbone_model)) > len(names(delta) | own)
        with pytest.warns(DeltaWarning, match="freeze_module"):
            delta.save_finetuned(tmp_path / str(len(own)))
        assert set(load_file(tmp_path / str(len(own)) / "model.safetensors")) == names(delta) | own


def test_what_another_delta_left_trainable_is_saved_with_that_one(tmp_path: Path) -> None:
    delta = trained("LoraModel", "bert_cls", exclude=["deltas", "classifier"])
    other = place("BitFitModel", "bert_cls", delta.backbone_model)
    with pytest.warns(DeltaWarning, match="what the LoraModel left trainable with that one alone"):
        other.save_finetuned(tmp_path)
    assert not CLASSIFIER & set(load_file(tmp_path / "model.safetensors"))


def test_after_a_freeze_nothing_warns(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("LoraModel", "bert_cls").save_finetuned(tmp_path)


@each_method
def test_a_loaded_delta_is_saved_again_as_it_was(method: str, tmp_path: Path) -> None:
    """Without any freeze in between."""
    delta = trained(method, "bert_cls", exclude=["deltas", "classifier"])
    delta.save_finetuned(tmp_path / "first")
    again = loaded(tmp_path / "first", "bert_cls")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.save_finetuned(tmp_path / "second")
    assert content(tmp_path / "first") == content(tmp_path / "second")


def test_constants_are_saved(tmp_path: Path) -> None:
    """A PHM rule that never trains is random: without it nobody could reproduce the delta."""
    delta = trained("CompacterModel", "bert_cls", learn_phm=False)
    delta.save_finetuned(tmp_path)
    rules = {
        name for name in load_file(tmp_path / "model.safetensors") if name.endswith("phm_rule")
    }
    assert len(rules) == 2 * 4
    assert torch.equal(output(loaded(tmp_path, "bert_cls"), "bert_cls"), output(delta, "bert_cls"))


def test_low_precision_is_kept(tmp_path: Path) -> None:
    model = backbones.build("bert_cls").to(torch.bfloat16)
    delta = LoraModel(model, modified_modules=["query"])
    randomise(delta)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    fresh = backbones.build("bert_cls").to(torch.bfloat16)
    again = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(output(again, "bert_cls"), output(delta, "bert_cls"))


@pytest.mark.parametrize("how", ["save_config=False", "save_checkpoint"])
def test_weights_that_are_saved_later_into_the_folder_load(how: str, tmp_path: Path) -> None:
    """As after each epoch: the config was written once, its sha256 must not forbid the new file."""
    for save_function in (None, torch.save):
        folder = tmp_path / str(save_function is None)
        delta = trained("LoraModel", "mlp")
        delta.save_finetuned(folder, save_function=save_function)
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(1)
        if how == "save_checkpoint":
            delta.save_checkpoint(folder)
        else:
            delta.save_finetuned(folder, save_config=False, save_function=save_function)
        assert torch.equal(output(loaded(folder, "mlp"), "mlp"), output(delta, "mlp"))


def test_a_delta_of_0_3_2_is_saved_again_with_all_it_held(tmp_path: Path) -> None:
    """Its config has no list of the backbone's parameters in the file; the file itself tells."""
    source = Path(__file__).parent / "golden" / "checkpoints" / "bitfit-bert_cls-classifier"
    first = AutoDeltaModel.from_finetuned(source, backbones.build("bert_cls"), check_hash=False)
    first.save_finetuned(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) >= names(first) | CLASSIFIER
    assert torch.equal(output(loaded(tmp_path, "bert_cls"), "bert_cls"), output(first, "bert_cls"))


# --- one name per tied storage --------------------------------------------------------------------


@pytest.mark.parametrize("end", ["wte", "lm_head"])
def test_a_tie_is_saved_once_and_loaded_at_both_ends(end: str, tmp_path: Path) -> None:
    delta = trained("LoraModel", "gpt2", exclude=["deltas", end])
    delta.save_finetuned(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == names(delta) | {"transformer.wte.weight"}
    again = loaded(tmp_path, "gpt2")
    model: Any = again.backbone_model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, saved["transformer.wte.weight"])
    assert torch.equal(output(again, "gpt2"), output(delta, "gpt2"))


def test_a_tie_that_was_undone_elsewhere_is_filled_at_its_own_end(tmp_path: Path) -> None:
    """The trained end is loaded; a backbone whose other end is its own keeps that."""
    delta = trained("LoraModel", "gpt2", exclude=["deltas", "wte"])
    delta.save_finetuned(tmp_path)
    untied: Any = backbones.build("gpt2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    before = untied.lm_head.weight.detach().clone()
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=untied, check_hash=False)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(untied.transformer.wte.weight, saved["transformer.wte.weight"])
    assert torch.equal(untied.lm_head.weight, before)


@pytest.mark.parametrize(
    "shared",
    [
        {"shared_phm_rule": True},
        {"shared_W_phm": True},
        {"shared_phm_rule": True, "shared_W_phm": True},
    ],
)
def test_parameters_that_a_delta_shares_are_saved_once(
    shared: dict[str, bool], tmp_path: Path
) -> None:
    delta = trained("CompacterModel", "bert_cls", **shared)
    delta.save_finetuned(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    apart = place("CompacterModel", "bert_cls")
    assert set(saved) == names(delta) < names(apart)
    again = loaded(tmp_path, "bert_cls")
    assert torch.equal(output(again, "bert_cls"), output(delta, "bert_cls"))
    assert len(list(again.parameters())) == len(saved)


def test_parallel_adapter_is_saved_under_its_first_module(tmp_path: Path) -> None:
    delta = trained("ParallelAdapterModel", "mlp")
    delta.save_finetuned(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name.split(".parallel_adapter.")[0] for name in saved} == {"first"}
    both = {**saved, **{name.replace("first.", "last.1."): t.clone() for name, t in saved.items()}}
    again = ParallelAdapterModel.from_finetuned(  # 0.3.2's files have it under both
        None, backbones.build("mlp"), delta_config=delta.config, state_dict=both
    )
    assert torch.equal(output(again, "mlp"), output(delta, "mlp"))


# --- a delta beside others ------------------------------------------------------------------------


@each_method
def test_a_delta_saved_beside_others_loads_alone(method: str, tmp_path: Path) -> None:
    """The file has a lone delta's names (`adapter`), whatever it is called beside others."""
    alone = trained(method, "bert_cls")
    model = backbones.build("bert_cls")
    others = [place(method, "bert_cls", model) for _ in range(2)]
    delta = place(method, "bert_cls", model)
    for other in others:
        randomise(other, scale=0.1)
    with torch.no_grad():
        for p, q in zip(delta.parameters(), alone.parameters(), strict=True):
            p.copy_(q)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names(alone)
    again = loaded(tmp_path, "bert_cls")
    assert torch.equal(output(again, "bert_cls"), output(alone, "bert_cls"))
    for other in others:
        other.detach()
    assert torch.equal(output(delta, "bert_cls"), output(alone, "bert_cls"))


@each_method
def test_a_lone_delta_loads_beside_others(method: str, tmp_path: Path) -> None:
    alone = trained(method, "bert_cls")
    alone.save_finetuned(tmp_path)
    model = backbones.build("bert_cls")
    first = place(method, "bert_cls", model)
    randomise(first, scale=0.1)
    second = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model)
    assert type(second) is type(alone)
    for p, q in zip(second.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)
    first.detach()
    assert torch.equal(output(second, "bert_cls"), output(alone, "bert_cls"))


def test_two_deltas_are_saved_and_loaded_together(tmp_path: Path) -> None:
    model = backbones.build("bert_cls")
    made = [place("LoraModel", "bert_cls", model), place("AdapterModel", "bert_cls", model)]
    for delta in made:
        randomise(delta)
        delta.freeze_module(exclude=["deltas", "classifier"])
    for count, delta in enumerate(made):
        delta.save_finetuned(tmp_path / str(count))
    fresh = backbones.build("bert_cls")
    for count in range(2):
        AutoDeltaModel.from_finetuned(tmp_path / str(count), backbone_model=fresh)
    assert torch.equal(backbones.run(fresh, "bert_cls"), backbones.run(model, "bert_cls"))


def test_beside_others_load_checkpoint_fills_the_right_one(tmp_path: Path) -> None:
    alone = trained("AdapterModel", "bert_cls")
    alone.save_checkpoint(tmp_path / "a.safetensors")
    model = backbones.build("bert_cls")
    first, second = (place("AdapterModel", "bert_cls", model) for _ in range(2))
    before = [p.clone() for p in first.parameters()]
    second.load_checkpoint(tmp_path / "a.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), before, strict=True))
    assert all(
        torch.equal(p, q) for p, q in zip(second.parameters(), alone.parameters(), strict=True)
    )


# --- other models' folders ------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"save_config": False}, {"save_function": torch.save}])
def test_a_backbones_folder_is_not_overwritten(arguments: dict[str, Any], tmp_path: Path) -> None:
    """`save_pretrained` writes files of the same two names."""
    model = backbones.build("bert_cls")
    model.save_pretrained(tmp_path)
    delta = trained("LoraModel", "bert_cls")
    before = content(tmp_path)
    assert {"config.json", "model.safetensors"} <= set(before)
    with unchanged(delta.backbone_model), pytest.raises(OpenDeltaError, match="overwrite=True"):
        delta.save_finetuned(tmp_path, **arguments)
    assert content(tmp_path) == before
    delta.save_finetuned(tmp_path, overwrite=True, **{**arguments, "save_config": True})
    assert torch.equal(output(loaded(tmp_path, "bert_cls"), "bert_cls"), output(delta, "bert_cls"))


def test_a_deltas_own_folder_is_overwritten(tmp_path: Path) -> None:
    trained("AdapterModel", "mlp").save_finetuned(tmp_path)
    delta = trained("LoraModel", "mlp")
    delta.save_finetuned(tmp_path)
    assert torch.equal(output(loaded(tmp_path, "mlp"), "mlp"), output(delta, "mlp"))


def test_saving_deletes_nothing_that_a_delta_did_not_write(tmp_path: Path) -> None:
    """The specification's second option has the user write `pytorch_model.bin` there by hand."""
    delta = trained("LoraModel", "mlp")
    torch.save(delta.backbone_model.state_dict(), tmp_path / "pytorch_model.bin")
    by_hand = (tmp_path / "pytorch_model.bin").read_bytes()
    delta.save_finetuned(tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_bytes() == by_hand
    assert torch.equal(output(loaded(tmp_path, "mlp"), "mlp"), output(delta, "mlp"))


@pytest.mark.parametrize("text", ["not json", "[1, 2]", "{}"])
def test_any_other_config_is_not_overwritten_either(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(OpenDeltaError, match="overwrite=True"):
        trained("LoraModel", "mlp").save_finetuned(tmp_path)
    assert content(tmp_path) == {"config.json": text.encode()}


def test_loading_from_a_backbones_folder_says_what_it_found(tmp_path: Path) -> None:
    backbones.build("bert_cls").save_pretrained(tmp_path)
    model = backbones.build("bert_cls")
    for cls in (LoraModel, AutoDeltaModel):
        with unchanged(model), pytest.raises(OpenDeltaError, match="'bert' backbone"):
            cls.from_finetuned(tmp_path, model)
    for loader in (LoraConfig, AutoDeltaConfig):
        with pytest.raises(OpenDeltaError, match="'bert' backbone"):
            loader.from_finetuned(tmp_path)


# --- atomic writes --------------------------------------------------------------------------------


class Interrupt(BaseException):
    """Not an Exception, as a keyboard interrupt is not."""


@pytest.mark.parametrize("error", [OSError("disk full"), Interrupt()], ids=["error", "interrupt"])
def test_a_failed_write_leaves_the_old_files(error: BaseException, tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp")
    delta.save_finetuned(tmp_path, save_function=torch.save)
    delta.save_checkpoint(tmp_path / "x.bin")
    before = content(tmp_path)
    with torch.no_grad():
        for p in delta.parameters():
            p.zero_()

    def fail(tensors: Any, path: str) -> None:
        Path(path).write_bytes(b"half a file")
        assert content(tmp_path).items() >= before.items()
        raise error

    for call in (
        lambda: delta.save_finetuned(tmp_path, save_function=fail),
        lambda: delta.save_checkpoint(tmp_path / "x.bin", fail),
    ):
        with pytest.raises(type(error)):
            call()
        assert content(tmp_path) == before


def test_a_reader_during_the_write_sees_the_old_delta(tmp_path: Path) -> None:
    old = trained("LoraModel", "mlp")
    old.save_finetuned(tmp_path, save_function=torch.save)
    expected = output(old, "mlp")
    seen = []

    def slow(tensors: Any, path: str) -> None:
        torch.save(tensors, path)
        seen.append(torch.equal(output(loaded(tmp_path, "mlp"), "mlp"), expected))

    new = trained("LoraModel", "mlp")
    with torch.no_grad():
        for p in new.parameters():
            p.add_(1)
    new.save_finetuned(tmp_path, save_function=slow)
    assert seen == [True]
    assert torch.equal(output(loaded(tmp_path, "mlp"), "mlp"), output(new, "mlp"))


def test_a_failed_config_write_leaves_the_old_config(tmp_path: Path) -> None:
    config = AdapterConfig(bottleneck_dim=5)
    config.save_finetuned(tmp_path)
    before = content(tmp_path)
    config.modified_modules = [object()]  # type: ignore[list-item]
    with pytest.raises(OpenDeltaError, match="modified_modules"):
        config.save_finetuned(tmp_path)
    assert content(tmp_path) == before


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    """Those of any new file, so that others may read what one shares."""
    (tmp_path / "ordinary").write_text("x")
    expected = (tmp_path / "ordinary").stat().st_mode
    trained("LoraModel", "mlp").save_finetuned(tmp_path / "delta")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "delta" / name).stat().st_mode == expected


def test_an_adapter_of_another_width_on_the_same_names(tmp_path: Path) -> None:
    """The config decides the shapes that the file must have."""
    model = backbones.build("mlp")
    wide = AdapterModel(model, modified_modules=["first"], bottleneck_dim=7)
    wide.freeze_module()
    wide.save_finetuned(tmp_path)
    again = loaded(tmp_path, "mlp")
    assert {p.shape for n, p in again.named_parameters() if n.endswith("down_proj.bias")} == {(7,)}


def test_a_delta_of_the_whole_is_saved_without_those_of_parts(tmp_path: Path) -> None:
    """Its file holds it and the backbone's own, and is known to fit a fresh backbone."""
    _, adapter, lora = part_and_whole()
    lora.freeze_module(exclude=["deltas", "encoder"])
    lora.save_finetuned(tmp_path)
    held = set(load_file(tmp_path / "model.safetensors"))
    assert not any("adapter" in name for name in held)
    fresh = backbones.build("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel.from_finetuned(tmp_path, backbone_model=fresh)
    adapter.detach()
    assert torch.equal(backbones.run(fresh, "bert"), backbones.run(lora.backbone_model, "bert"))


# --- what a failed save leaves -------------------------------------------------------------------


def saved_lora(folder: Path) -> tuple[nn.Module, DeltaBase, Tensor]:
    """A delta that was saved into `folder`, with what the backbone computed then."""
    model, delta = built("LoraModel", "bert")
    delta.freeze_module()
    randomise(delta)
    delta.save_finetuned(folder)
    return model, delta, backbones.run(model, "bert")


def loaded_output(folder: Path) -> Tensor:
    fresh = backbones.build("bert")
    AutoDeltaModel.from_finetuned(folder, backbone_model=fresh)
    return backbones.run(fresh, "bert")


def test_a_save_function_that_writes_nothing_keeps_the_old_files(tmp_path: Path) -> None:
    """As on ranks other than the first: what an earlier save left still loads."""
    _, delta, expected = saved_lora(tmp_path)
    before = content(tmp_path)
    randomise(delta, 0.5)
    delta.save_finetuned(tmp_path, save_function=lambda tensors, path: None)
    delta.save_checkpoint(tmp_path, save_func=lambda tensors, path: None)
    assert content(tmp_path) == before
    assert torch.equal(loaded_output(tmp_path), expected)


def test_a_save_function_that_writes_elsewhere_raises(tmp_path: Path) -> None:
    """One that appends a suffix leaves nothing behind, and the old files as they were."""
    _, delta, _ = saved_lora(tmp_path)
    before = content(tmp_path)

    def appends(tensors: dict[str, Tensor], path: str) -> None:
        torch.save(tensors, path + ".part")

    with pytest.raises(CheckpointError, match=r"\.part"):
        delta.save_finetuned(tmp_path, save_function=appends)
    with pytest.raises(CheckpointError, match=r"\.part"):
        delta.save_checkpoint(tmp_path / "w.bin", save_func=appends)
    assert content(tmp_path) == before


def test_a_config_that_json_cannot_hold_leaves_the_old_files(tmp_path: Path) -> None:
    """Weights are replaced only together with a config that can be written."""
    _, delta, expected = saved_lora(tmp_path)
    before = content(tmp_path)
    randomise(delta, 0.5)
    delta.config.dict_tags = {"task": object()}
    with pytest.raises(opendelta.OpenDeltaError, match="cannot be saved"):
        delta.save_finetuned(tmp_path)
    assert content(tmp_path) == before
    assert torch.equal(loaded_output(tmp_path), expected)


def test_a_file_holds_of_the_backbone_only_what_its_config_lists(tmp_path: Path) -> None:
    """A parameter of the backbone that the config does not list would overwrite it unseen."""
    _, delta, _ = saved_lora(tmp_path)
    name = "embeddings.word_embeddings.weight"
    weight = delta.backbone_model.get_parameter(name)
    tensors = {**load_file(tmp_path / "model.safetensors"), name: torch.zeros_like(weight)}
    fresh = backbones.build("bert")
    with unchanged(fresh), pytest.raises(CheckpointError, match=name):
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh, state_dict=tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        delta.load_checkpoint(tmp_path)
    assert weight.abs().sum() > 0


# --- places that are refused ---------------------------------------------------------------------


def listing(folder: Path) -> Iterator[tuple[str, bytes]]:
    return ((path.name, path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file())


def test_saving_into_a_file(tmp_path: Path, model: Any) -> None:
    delta = place("LoraModel", "bert_cls", model)
    delta.freeze_module()
    (tmp_path / "x").write_text("x")
    before = list(listing(tmp_path))
    with unchanged(model), pytest.raises(OpenDeltaError, match="x is a file"):
        delta.save_finetuned(tmp_path / "x")
    assert list(listing(tmp_path)) == before


def test_saving_into_another_models_folder(tmp_path: Path, model: Any) -> None:
    delta = place("LoraModel", "bert_cls", model)
    delta.freeze_module()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights of a backbone")
    before = list(listing(tmp_path))
    with unchanged(model), pytest.raises(OpenDeltaError) as caught:
        delta.save_finetuned(tmp_path)
    told(caught.value, (str(tmp_path), "'bert' backbone", "overwrite=True"))
    assert list(listing(tmp_path)) == before


def test_an_unknown_argument_of_saving(tmp_path: Path, model: Any) -> None:
    delta = place("LoraModel", "bert_cls", model)
    delta.freeze_module()
    with unchanged(model), pytest.raises(TypeError):
        delta.save_finetuned(tmp_path, overwrit=True)
    assert list(listing(tmp_path)) == []
