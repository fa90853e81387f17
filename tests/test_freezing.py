"""What trains after `freeze_module`, and what `state_dict()` holds then."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import IMPOSSIBLE, METHODS, built, output, randomise
from hypothesis import given
from hypothesis import strategies as st
from pieces import part_and_whole
from placed import PLACED, PLACED_METHODS, place, trainable, unchanged
from torch import nn

import opendelta
from opendelta import AdapterModel, AutoDeltaModel, BitFitModel, DeltaWarning, LoraModel
from opendelta.exceptions import UnmatchedPatternWarning

placed = pytest.mark.parametrize(("method", "backbone"), PLACED)
each_method = pytest.mark.parametrize("method", PLACED_METHODS)


def delta_names(model: nn.Module) -> set[str]:
    """Names in the backbone of the parameters that its delta objects hold."""
    held = {id(p) for delta in opendelta.deltas(model) for p in delta.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in held}


def reached(names: set[str], pattern: str) -> set[str]:
    """Reference: the names whose dotted parts, or an ancestor's, end with the pattern's."""
    wanted = pattern.split(".")

    def hit(name: str) -> bool:
        parts = name.split(".")
        ancestors = (parts[:count] for count in range(1, len(parts) + 1))
        return any(ancestor[-len(wanted) :] == wanted for ancestor in ancestors)

    return {name for name in names if hit(name)}


def bare_names(backbone: str) -> set[str]:
    return {name for name, _ in backbones.build(backbone).named_parameters()}


# --- which parameters train -----------------------------------------------------------------------


@placed
def test_by_default_the_delta_alone_trains(method: str, backbone: str) -> None:
    delta = place(method, backbone)
    model = delta.backbone_model
    assert {n for n, p in model.named_parameters() if p.requires_grad} > delta_names(model)
    delta.freeze_module()
    assert trainable(model) == delta_names(model) != set()


@placed
def test_a_delta_before_freezing_leaves_the_backbone_trainable(method: str, backbone: str) -> None:
    """Constructing freezes nothing: that is `freeze_module`'s."""
    model = place(method, backbone).backbone_model
    assert all(p.requires_grad for p in model.parameters())


# specification 1.20.1: the examples of `unfrozen_modules`, on DistilBert
EXAMPLES = [
    ["bias"],
    ["attention"],
    ["deltas"],
    ["1.ffn.lin2", "deltas"],
    ["embeddings", "deltas"],
    ["layer.0"],
    ["position_embeddings.weight"],
    ["transformer", "deltas"],
]


@pytest.mark.parametrize("how", ["exclude", "unfrozen_modules"])
@pytest.mark.parametrize("patterns", EXAMPLES, ids="+".join)
def test_what_is_named_trains_with_all_inside(patterns: list[str], how: str) -> None:
    model = backbones.build("distilbert")
    own = {name for name, _ in model.named_parameters()}
    unfrozen = patterns if how == "unfrozen_modules" else None
    delta = AdapterModel(
        model, modified_modules=["embeddings.LayerNorm"], unfrozen_modules=unfrozen
    )
    delta.freeze_module(exclude=patterns if how == "exclude" else None)
    expected = set().union(*(reached(own, p) for p in patterns if p != "deltas"))
    if "deltas" in patterns:
        expected |= delta_names(model)
    assert trainable(model) & own == expected & own
    assert (trainable(model) >= delta_names(model)) is (
        "deltas" in patterns or "embeddings" in patterns
    )


def test_exclude_replaces_the_default() -> None:
    """["classifier"] freezes the delta too."""
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module(exclude=["classifier"])
    assert trainable(delta.backbone_model) == {"classifier.weight", "classifier.bias"}


def test_exclude_beats_unfrozen_modules() -> None:
    delta = place("LoraModel", "bert_cls", unfrozen_modules=["pooler", "deltas"])
    delta.freeze_module(exclude=["classifier"])
    assert trainable(delta.backbone_model) == {"classifier.weight", "classifier.bias"}


def test_regular_expressions_in_exclude() -> None:
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module(exclude=[r"[r]layer\.1\.output\.\w+", r"[r].*pooler.*bias"])
    assert trainable(delta.backbone_model) == {
        "bert.encoder.layer.1.output.dense.weight",
        "bert.encoder.layer.1.output.dense.bias",
        "bert.encoder.layer.1.output.LayerNorm.weight",
        "bert.encoder.layer.1.output.LayerNorm.bias",
        "bert.pooler.dense.bias",
    }


def test_a_named_bias_trains_where_a_delta_sits_too() -> None:
    """0.3.2 missed the bias of the very modules that carry a delta."""
    delta = place("AdapterModel", "bert_cls", unfrozen_modules=["output.dense.bias", "deltas"])
    delta.freeze_module()
    own = trainable(delta.backbone_model) - delta_names(delta.backbone_model)
    assert own == reached(bare_names("bert_cls"), "output.dense.bias")
    assert len(own) == 4


def test_bitfit_and_a_backbone_bias_of_the_same_module() -> None:
    """BitFit's bias stands in for the backbone's, so it answers to that name too."""
    delta = place("BitFitModel", "bert_cls")
    delta.freeze_module(exclude=["0.attention"])
    assert trainable(delta.backbone_model) == reached(bare_names("bert_cls"), "0.attention")


PATTERNS = [
    "bias", "weight", "attention", "output", "layer.0", "layer.1", "output.dense", "dense.bias",
    "classifier", "pooler", "query", "0.attention.self", "LayerNorm", "encoder", "embeddings",
]  # fmt: skip
OWN = bare_names("bert_cls")


@given(st.sets(st.sampled_from(PATTERNS), max_size=3), st.booleans())
def test_property_trainable_set(patterns: set[str], with_deltas: bool) -> None:
    delta = LoraModel(
        backbones.build("bert_cls"), modified_modules=["intermediate.dense"], lora_r=1
    )
    model = delta.backbone_model
    exclude = sorted(patterns) + ["deltas"] * with_deltas
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeltaWarning)
        delta.freeze_module(exclude=exclude)
    expected = set().union(*(reached(OWN, p) for p in patterns)) if patterns else set()
    assert trainable(model) & OWN == expected
    if with_deltas:
        assert trainable(model) >= delta_names(model)
    assert set(model.state_dict()) == trainable(model)


# --- several deltas -------------------------------------------------------------------------------


def two() -> tuple[nn.Module, LoraModel, AdapterModel]:
    model = backbones.build("bert_cls")
    lora = LoraModel(model, modified_modules=["query"], lora_r=2)
    adapter = AdapterModel(model, modified_modules=["output.dense"], bottleneck_dim=2)
    return model, lora, adapter


def held(delta: nn.Module) -> set[str]:
    return {name for name, _ in delta.named_parameters()}


@pytest.mark.parametrize("caller", [0, 1])
def test_deltas_means_every_delta_whoever_freezes(caller: int) -> None:
    model, *both = two()
    both[caller].freeze_module()
    assert trainable(model) == held(both[0]) | held(both[1])


@pytest.mark.parametrize("caller", [0, 1])
@pytest.mark.parametrize("kept", [0, 1])
def test_a_delta_object_in_exclude_means_that_delta_alone(caller: int, kept: int) -> None:
    """Train one, keep another."""
    model, *both = two()
    both[caller].freeze_module(exclude=[both[kept], "classifier"])
    assert trainable(model) == held(both[kept]) | {"classifier.weight", "classifier.bias"}


def test_a_lone_delta_object_is_a_list_of_one() -> None:
    model, lora, adapter = two()
    lora.freeze_module(exclude=adapter)  # type: ignore[arg-type]
    assert trainable(model) == held(adapter)


def test_a_detached_delta_is_frozen_and_unfrozen_with_the_rest() -> None:
    model, lora, adapter = two()
    adapter.detach()
    lora.freeze_module(exclude=[lora])
    adapter.attach()
    assert trainable(model) == held(lora)


def test_a_delta_of_another_backbone_in_exclude_raises() -> None:
    model, lora, _ = two()
    _, stranger, _ = two()
    with unchanged(model), pytest.raises(ValueError, match="exclude"):
        lora.freeze_module(exclude=[stranger])


# --- again, and back ------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("training", [True, False])
def test_freezing_twice_is_freezing_once(method: str, training: bool) -> None:
    delta = place(method, "bert_cls")
    model = delta.backbone_model.train(training)
    delta.freeze_module()
    once = trainable(model), list(model.state_dict())
    delta.freeze_module()
    assert (trainable(model), list(model.state_dict())) == once
    assert model.training is training


@each_method
def test_another_exclude_takes_the_place_of_the_last(method: str) -> None:
    model = backbones.build("bert_cls")
    delta = place(method, "bert_cls", model)
    delta.freeze_module(exclude=["pooler"])
    delta.freeze_module(exclude=["deltas", "classifier"])
    assert trainable(model) == delta_names(model) | {"classifier.weight", "classifier.bias"}
    delta.freeze_module(exclude=["bert", "classifier"])
    untouched = {name for name, _ in backbones.build("bert_cls").named_parameters()}
    assert trainable(model) >= untouched


def test_what_the_user_froze_stays_frozen_when_named() -> None:
    """`exclude` leaves parameters untouched; it does not train what did not train before."""
    model = backbones.build("bert_cls")
    model.bert.pooler.dense.weight.requires_grad = False
    delta = place("LoraModel", "bert_cls", model)
    for _ in range(2):
        delta.freeze_module(exclude=["deltas", "pooler"])
        own = trainable(model) - delta_names(model)
        assert own == {"bert.pooler.dense.bias"}


@placed
def test_remove_gives_back_what_trained_before(method: str, backbone: str) -> None:
    model = backbones.build(backbone)
    frozen = [name for name, _ in model.named_parameters()][::3]
    for name in frozen:
        model.get_parameter(name).requires_grad = False
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    delta = place(method, backbone, model)
    delta.freeze_module()
    delta.freeze_module(exclude=["bias", "deltas"] if backbone in ("bert_cls", "gpt2") else None)
    delta.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@placed
def test_detach_leaves_the_backbone_frozen(method: str, backbone: str) -> None:
    """Other deltas may rely on it."""
    delta = place(method, backbone)
    model = delta.backbone_model
    delta.freeze_module()
    delta.detach()
    assert trainable(model) == set()
    delta.attach()
    assert trainable(model) == delta_names(model)


def test_a_delta_added_after_a_freeze_trains_too() -> None:
    model, lora, adapter = two()
    lora.freeze_module()
    third = AdapterModel(model, modified_modules=["intermediate.dense"], bottleneck_dim=2)
    assert trainable(model) == held(lora) | held(adapter) | held(third)
    assert set(model.state_dict()) == trainable(model)


# --- part of a backbone ---------------------------------------------------------------------------


def test_freezing_part_of_a_backbone() -> None:
    delta = place("LoraModel", "bert_cls")
    model = delta.backbone_model
    delta.freeze_module(model.bert.encoder.layer[0])
    frozen = {name for name in OWN if name.startswith("bert.encoder.layer.0.")}
    assert trainable(model) == (OWN - frozen) | delta_names(model)


def test_freezing_part_by_part_is_freezing_the_whole() -> None:
    delta = place("LoraModel", "bert_cls")
    model = delta.backbone_model
    delta.freeze_module(model.bert, exclude=["deltas", "pooler"])
    delta.freeze_module(model.classifier, exclude=["classifier"])
    expected = trainable(model)
    other = place("LoraModel", "bert_cls")
    other.freeze_module(exclude=["deltas", "pooler", "classifier"])
    assert expected == trainable(other.backbone_model)


def test_the_prefix_argument_names_the_part() -> None:
    delta = place("LoraModel", "bert_cls")
    model = delta.backbone_model
    delta.freeze_module(model.bert.encoder, prefix="bert.encoder")
    other = place("LoraModel", "bert_cls")
    other.freeze_module(other.backbone_model.bert.encoder)
    assert trainable(model) == trainable(other.backbone_model) < OWN | delta_names(model)


def test_a_module_of_another_model_is_refused() -> None:
    delta = place("LoraModel", "bert_cls")
    stranger = backbones.build("bert_cls").bert
    with unchanged(delta.backbone_model), pytest.raises(ValueError, match="no module of the"):
        delta.freeze_module(stranger)


# --- warnings -------------------------------------------------------------------------------------


@each_method
def test_a_freeze_that_leaves_nothing_to_train_warns(method: str) -> None:
    delta = place(method, "bert_cls")
    with pytest.warns(DeltaWarning, match="[Nn]othing is left to train"):
        delta.freeze_module(exclude=[])
    assert trainable(delta.backbone_model) == set()


def test_freezing_the_delta_that_the_user_froze_warns_too() -> None:
    model = backbones.build("bert_cls")
    model.requires_grad_(False)
    delta = place("LoraModel", "bert_cls", model)
    with pytest.warns(DeltaWarning, match="[Nn]othing is left to train"):
        delta.freeze_module(exclude=["classifier"])


@placed
def test_an_ordinary_freeze_does_not_warn(method: str, backbone: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        place(method, backbone).freeze_module()


def test_each_unmatched_pattern_warns_and_the_others_act() -> None:
    delta = place("LoraModel", "bert_cls")
    with pytest.warns(UnmatchedPatternWarning) as seen:
        delta.freeze_module(exclude=["nowhere", "classifier", "neither"])
    assert [sum(word in str(w.message) for w in seen) for word in ("'nowhere'", "'neither'")] == [
        1,
        1,
    ]
    assert trainable(delta.backbone_model) == {"classifier.weight", "classifier.bias"}


def test_a_freeze_that_forgets_the_deltas_says_so() -> None:
    delta = place("LoraModel", "bert_cls")
    with pytest.warns(DeltaWarning, match=r"All deltas are frozen.*exclude=\['deltas', "):
        delta.freeze_module(exclude=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.freeze_module(exclude=[delta])
        delta.freeze_module(exclude=["lora_B", "classifier"])


def warnings_of(model: nn.Module, backbone: str, times: int = 1) -> list[str]:
    """What the library warns of while the model runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            output(model, backbone)
    return [str(w.message) for w in caught if issubclass(w.category, DeltaWarning)]


FORGOTTEN = [
    (m, b) for m in METHODS for b in ("bert_cls", "llama", "mlp") if (m, b) not in IMPOSSIBLE
]


@pytest.mark.parametrize(("method", "backbone"), FORGOTTEN)
def test_a_forgotten_freeze_is_told_once_when_training_begins(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    assert warnings_of(model, backbone) == []  # in eval
    with torch.no_grad():
        assert warnings_of(model.train(), backbone) == []
    with delta.detached:
        assert warnings_of(model, backbone) == []  # the backbone alone trains
    (message,) = warnings_of(model, backbone, times=2)
    own = {id(p) for p in model.parameters()} - {id(p) for p in delta.parameters()}
    assert "freeze_module was never called" in message and f"all {len(own)} parameters" in message
    assert warnings_of(model, backbone) == []


@pytest.mark.parametrize("frozen", ["deltas alone", "nothing, on purpose", "one by hand", "before"])
@pytest.mark.parametrize("backbone", ["bert_cls", "llama", "mlp"])
def test_a_backbone_that_somebody_froze_is_trained_without_a_word(
    backbone: str, frozen: str
) -> None:
    model, delta = built("LoraModel", backbone)
    children = [name for name, _ in model.named_children()]
    if frozen == "deltas alone":
        delta.freeze_module()
    elif frozen == "nothing, on purpose":
        delta.freeze_module(exclude=["deltas", *children])
    elif frozen == "one by hand":
        next(model.parameters()).requires_grad = False
    else:
        delta.freeze_module()
        built_on_top = place("BitFitModel", backbone, model)
        assert all(p.requires_grad for p in built_on_top.parameters())
    assert trainable(model)
    assert warnings_of(model.train(), backbone, times=2) == []


def test_forgetting_is_told_of_a_loaded_delta_a_new_life_and_a_routed_batch(tmp_path: Path) -> None:
    model, delta = built("LoraModel", "bert_cls")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    assert warnings_of(model.train(), "bert_cls") == []
    delta.remove()  # which unfreezes
    again = AutoDeltaModel.from_finetuned(tmp_path, model)
    assert warnings_of(model, "bert_cls") == []
    assert len(warnings_of(model.train(), "bert_cls")) == 1
    again.remove()
    routed = LoraModel(model)
    routed.detach()
    with opendelta.route(model, [routed, None]):
        assert len(warnings_of(model, "bert_cls", times=2)) == 1


# --- the trimmed state dict -----------------------------------------------------------------------


@placed
def test_the_state_dict_holds_what_trains(method: str, backbone: str) -> None:
    model = backbones.build(backbone)
    full = list(model.state_dict())
    delta = place(method, backbone, model)
    assert set(full) <= set(model.state_dict())
    delta.freeze_module()
    assert set(model.state_dict()) == trainable(model)
    held_values = dict(model.named_parameters())
    for name, value in model.state_dict().items():
        assert value.data_ptr() == held_values[name].data_ptr()


@each_method
def test_set_state_dict_false_leaves_it_whole(method: str) -> None:
    model = backbones.build("bert_cls")
    delta = place(method, "bert_cls", model)
    full = list(model.state_dict())
    delta.freeze_module(set_state_dict=False)
    assert list(model.state_dict()) == full
    assert trainable(model) == delta_names(model)


def test_set_active_state_dict_trims_by_hand() -> None:
    model = backbones.build("bert_cls")
    delta = place("LoraModel", "bert_cls", model)
    delta.freeze_module(set_state_dict=False)
    delta.set_active_state_dict(model)
    once = set(model.state_dict())
    delta.set_active_state_dict(model)
    assert set(model.state_dict()) == once == trainable(model)


def test_set_active_state_dict_of_a_part() -> None:
    model = backbones.build("bert_cls")
    delta = place("LoraModel", "bert_cls", model)
    delta.freeze_module(exclude=["deltas", "classifier"], set_state_dict=False)
    part = model.bert.encoder.layer[1]
    for _ in range(2):  # idempotent
        delta.set_active_state_dict(part)
    assert set(part.state_dict()) == {n for n, p in part.named_parameters() if p.requires_grad}
    assert set(model.bert.encoder.layer[0].state_dict()) > set(part.state_dict())
    delta.remove()
    assert set(part.state_dict()) == set(
        backbones.build("bert_cls").bert.encoder.layer[1].state_dict()
    )


def test_the_state_dict_follows_requires_grad() -> None:
    """It is read when asked for, not fixed when frozen."""
    model = backbones.build("bert_cls")
    place("LoraModel", "bert_cls", model).freeze_module()
    model.classifier.bias.requires_grad = True
    assert "classifier.bias" in model.state_dict()
    assert "classifier.weight" not in model.state_dict()


@pytest.mark.parametrize("prefix", ["", "net.", "a.b."])
def test_the_state_dict_is_trimmed_under_any_prefix(prefix: str) -> None:
    model = backbones.build("bert_cls")
    place("LoraModel", "bert_cls", model).freeze_module()
    expected = {prefix + name for name in trainable(model)}
    assert set(model.state_dict(prefix=prefix)) == expected
    wrapper: nn.Module = model
    for part in reversed(prefix.rstrip(".").split(".") if prefix else []):
        wrapper = nn.ModuleDict({part: wrapper})
    assert set(wrapper.state_dict()) == expected
    assert set(nn.DataParallel(model).state_dict()) == {f"module.{n}" for n in trainable(model)}


def test_a_wrapper_keeps_its_other_children_whole() -> None:
    model = backbones.build("bert_cls")
    place("LoraModel", "bert_cls", model).freeze_module()
    both = nn.ModuleDict({"a": model, "b": nn.Linear(2, 2)})
    both["b"].requires_grad_(False)
    assert {"b.weight", "b.bias"} <= set(both.state_dict())


def test_a_dict_that_the_caller_gives_keeps_its_other_entries() -> None:
    model = backbones.build("bert_cls")
    place("LoraModel", "bert_cls", model).freeze_module()
    given_dict: OrderedDict[str, Any] = OrderedDict(other=torch.ones(1))
    model.state_dict(destination=given_dict)
    assert set(given_dict) == trainable(model) | {"other"}


@placed
def test_detach_gives_the_bare_state_dict_and_attach_the_trimmed_one(
    method: str, backbone: str
) -> None:
    bare = backbones.build(backbone).state_dict()
    delta = place(method, backbone)
    model = delta.backbone_model
    delta.freeze_module()
    trimmed = list(model.state_dict())
    delta.detach()
    assert list(model.state_dict()) == list(bare)
    assert all(torch.equal(value, bare[name]) for name, value in model.state_dict().items())
    delta.attach()
    assert list(model.state_dict()) == trimmed


@each_method
def test_reset_state_dict_false_leaves_it_as_it_is(method: str) -> None:
    delta = place(method, "bert_cls")
    model = delta.backbone_model
    delta.freeze_module()
    delta.detach(reset_state_dict=False)
    assert set(model.state_dict()) == set()  # still reduced to what trains, which is nothing now
    delta.attach(reset_state_dict=False)
    assert set(model.state_dict()) == trainable(model) == delta_names(model)
    delta.detach()
    full = list(model.state_dict())
    assert full == list(backbones.build("bert_cls").state_dict())
    delta.attach(reset_state_dict=False)
    assert set(model.state_dict()) == set(full) | delta_names(model)
    delta.detach()
    delta.attach()
    assert set(model.state_dict()) == delta_names(model)


def test_with_two_deltas_the_state_dict_is_full_once_both_are_detached() -> None:
    model, lora, adapter = two()
    lora.freeze_module()
    adapter.detach()
    assert set(model.state_dict()) == held(lora)
    lora.detach()
    assert list(model.state_dict()) == list(backbones.build("bert_cls").state_dict())


# --- load_state_dict ------------------------------------------------------------------------------


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@placed
@pytest.mark.parametrize("depth", [0, 2])
def test_load_state_dict_takes_full_and_trimmed_dicts(
    method: str, backbone: str, depth: int
) -> None:
    """Strictly, under any prefix."""
    source = place(method, backbone)
    randomise(source)
    full = {name: tensor.clone() for name, tensor in source.backbone_model.state_dict().items()}
    source.freeze_module()
    trimmed = {name: tensor.clone() for name, tensor in source.backbone_model.state_dict().items()}
    assert len(trimmed) < len(full)
    prefix = "a." * depth
    for content in (full, trimmed):
        target = place(method, backbone)
        target.freeze_module()
        wrapper: nn.Module = target.backbone_model
        for _ in range(depth):
            wrapper = nn.ModuleDict({"a": wrapper})
        result = wrapper.load_state_dict(
            {prefix + name: t for name, t in content.items()}, strict=True
        )
        assert result.missing_keys == [] and result.unexpected_keys == []
        expected = values(source.backbone_model)
        assert all(torch.equal(p, expected[n]) for n, p in target.backbone_model.named_parameters())


def test_load_state_dict_still_tells_what_is_wrong() -> None:
    delta = place("LoraModel", "bert_cls")
    model = delta.backbone_model
    delta.freeze_module()
    trimmed = dict(model.state_dict())
    lost = sorted(trimmed)[0]
    with pytest.raises(RuntimeError, match="stranger"):
        model.load_state_dict({**trimmed, "stranger": torch.ones(1)})
    with pytest.raises(RuntimeError, match=lost):
        model.load_state_dict({name: t for name, t in trimmed.items() if name != lost})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**trimmed, lost: torch.ones(1)})


def test_load_state_dict_does_not_change_the_callers_dict() -> None:
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module()
    trimmed = dict(delta.backbone_model.state_dict())
    before = list(trimmed)
    delta.backbone_model.load_state_dict(trimmed)
    assert list(trimmed) == before


@placed
def test_plain_torch_files(method: str, backbone: str, tmp_path: Path) -> None:
    """Option 2 of the specification's step 5: torch.save the state dict, load with strict=False."""
    source = place(method, backbone)
    randomise(source)
    source.freeze_module()
    torch.save(source.backbone_model.state_dict(), tmp_path / "pytorch_model.bin")
    target = place(method, backbone)
    model = target.backbone_model
    assert not torch.equal(
        backbones.run(model, backbone), backbones.run(source.backbone_model, backbone)
    )
    result = model.load_state_dict(torch.load(tmp_path / "pytorch_model.bin"), strict=False)
    assert result.unexpected_keys == []
    assert torch.equal(
        backbones.run(model, backbone), backbones.run(source.backbone_model, backbone)
    )


# --- tied parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["wte", "lm_head"])
def test_either_end_of_a_tie_unfreezes_it_and_says_so_once(
    end: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = backbones.build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    delta = place("LoraModel", "gpt2", model)
    with caplog.at_level(logging.INFO, logger="opendelta"):
        delta.freeze_module(exclude=["deltas", end])
        delta.freeze_module(exclude=["deltas", end])
    assert trainable(model) == delta_names(model) | {"transformer.wte.weight"}
    told = [r.getMessage() for r in caplog.records if "tied" in r.getMessage()]
    assert len(told) == 1
    assert "lm_head.weight" in told[0] and "transformer.wte.weight" in told[0]


def test_a_tie_that_nobody_names_is_frozen() -> None:
    model = backbones.build("t5")
    delta = place("LoraModel", "t5", model)
    delta.freeze_module()
    assert not model.shared.weight.requires_grad
    assert trainable(model) == delta_names(model)


def test_freezing_one_end_of_a_tie_freezes_the_parameter() -> None:
    model: Any = backbones.build("gpt2")
    delta = place("LoraModel", "gpt2", model)
    delta.freeze_module(model.lm_head)
    assert not model.transformer.wte.weight.requires_grad
    assert model.transformer.wpe.weight.requires_grad


def test_a_tie_is_in_the_trimmed_state_dict_once() -> None:
    model = backbones.build("gpt2")
    delta = place("LoraModel", "gpt2", model)
    delta.freeze_module(exclude=["deltas", "lm_head"])
    tied = {"transformer.wte.weight", "lm_head.weight"} & set(model.state_dict())
    assert tied == {"transformer.wte.weight"}
    fresh = backbones.build("gpt2")
    torch.nn.init.zeros_(fresh.lm_head.weight)
    other = place("LoraModel", "gpt2", fresh)
    other.freeze_module(exclude=["deltas", "lm_head"])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.lm_head.weight, model.transformer.wte.weight)


def test_a_shared_module_is_frozen_under_every_name() -> None:
    """One linear under two names, one of them excluded: it trains."""
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "a": shared, "b": shared})
    delta = LoraModel(model, modified_modules=["first"], lora_r=1)
    delta.freeze_module(exclude=["deltas", "b"])
    assert trainable(model) == delta_names(model) | {"a.weight", "a.bias"}
    delta.freeze_module()  # as before
    assert trainable(model) == delta_names(model) | {"a.weight", "a.bias"}
    delta.freeze_module(exclude=["deltas"])
    assert trainable(model) == delta_names(model)


def test_compacters_shared_rule_is_kept_constant() -> None:
    """learn_phm=False: no freeze makes it train, and the state dict holds it all the same."""
    model = backbones.build("bert_cls")
    delta = place("CompacterModel", "bert_cls", model, learn_phm=False)
    for exclude in (None, ["deltas"], ["phm_rule", "deltas"], ["compactor"]):
        delta.freeze_module(exclude=exclude)
        assert not any("phm_rule" in name for name in trainable(model))
        rules = {name for name in model.state_dict() if name.endswith("phm_rule")}
        assert rules == {name for name in delta_names(model) if name.endswith("phm_rule")} != set()


# --- loaded deltas --------------------------------------------------------------------------------


def test_a_loaded_delta_is_as_trainable_as_the_backbone_was(tmp_path: Path) -> None:
    """The loaded model is fully trainable until `freeze_module` is called again."""
    saved = place("LoraModel", "bert_cls", unfrozen_modules=["deltas", "classifier"])
    saved.freeze_module()
    saved.save_finetuned(tmp_path)
    model = backbones.build("bert_cls").train()
    model.bert.pooler.dense.bias.requires_grad = False
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model)
    assert trainable(model) == (OWN | delta_names(model)) - {"bert.pooler.dense.bias"}
    assert not model.training
    loaded.freeze_module()
    assert trainable(model) == trainable(saved.backbone_model)


def test_bitfit_frees_what_it_set_aside() -> None:
    """The backbone's own biases come back with the flags they had."""
    model = backbones.build("bert_cls")
    bias = model.bert.encoder.layer[0].attention.self.query.bias
    other = model.bert.encoder.layer[1].attention.self.query.bias
    other.requires_grad = False
    delta = BitFitModel(model, modified_modules=["attention"])
    delta.freeze_module()
    delta.detach()
    assert model.bert.encoder.layer[0].attention.self.query.bias is bias
    assert not bias.requires_grad
    delta.remove()
    assert bias.requires_grad and not other.requires_grad


# --- parts and wholes ----------------------------------------------------------------------------


def test_another_deltas_freeze_sees_assigned_biases_too() -> None:
    """Whichever delta freezes, biases that were assigned remain BitFit's."""
    model, bitfit = built("BitFitModel", "bert")
    lora = LoraModel(model)
    loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    lora.freeze_module()
    both = {name for delta in (bitfit, lora) for name, _ in delta.named_parameters()}
    assert trainable(model) == both
    lora.freeze_module(exclude=["deltas", "bias"])
    assert not set(lora.left_trainable or ()) & {name for name, _ in bitfit.named_parameters()}


def ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


def test_freezing_the_whole_knows_the_deltas_of_its_parts() -> None:
    """``"deltas"`` and delta objects in `exclude` reach those put on a part of the backbone."""
    model, adapter, lora = part_and_whole()
    assert set(opendelta.deltas(model)) == {adapter, lora}
    for exclude, kept in (
        (["deltas"], ids(adapter) | ids(lora)),
        ([adapter], ids(adapter)),
        ([lora], ids(lora)),
    ):
        lora.freeze_module(exclude=exclude)
        assert {id(p) for p in model.parameters() if p.requires_grad} == kept
        assert lora.left_trainable == []
    lora.freeze_module(exclude=["deltas", "pooler"])
    assert lora.left_trainable == ["pooler.dense.weight", "pooler.dense.bias"]


def test_a_model_with_a_frozen_part_takes_its_own_state_dict() -> None:
    """``load_state_dict(state_dict())`` works though one part's entries are left out."""
    model, adapter, lora = part_and_whole()
    expected = backbones.run(model, "bert")
    adapter.freeze_module()
    whole = len(list(model.parameters()))
    assert len(model.state_dict()) < whole
    model.load_state_dict(model.state_dict())
    lora.freeze_module(module=model.embeddings)
    assert not any(name.startswith("embeddings") for name in model.state_dict())
    model.load_state_dict(model.state_dict())
    assert torch.equal(backbones.run(model, "bert"), expected)


@pytest.mark.parametrize("more", [[], ["pooler"]])
def test_a_dict_that_stays_reduced_can_be_loaded_again(more: list[str]) -> None:
    """With ``reset_state_dict=False`` a detached model still takes what it gives."""
    model, delta = built("LoraModel", "bert")
    delta.freeze_module(exclude=["deltas", *more])
    delta.detach(reset_state_dict=False)
    reduced = model.state_dict()
    assert set(reduced) == {f"{part}.dense.{p}" for part in more for p in ("weight", "bias")}
    model.load_state_dict(reduced)
    delta.attach()
    assert len(model.state_dict()) == len(reduced) + len(list(delta.parameters()))
