"""Attaching, detaching, removing: what acts afterwards, and what is left as it was."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import built, randomise
from pieces import BF16, dtypes, linears, parameter_names
from placed import PLACED, PLACED_METHODS, fingerprint, place, trainable, unchanged
from torch import nn

import opendelta
from opendelta import AdapterModel, AutoDeltaModel, DeltaBase, LoraModel, OpenDeltaError
from opendelta.exceptions import InsertionError

# --- attach and detach ---------------------------------------------------------------------------


each_method = pytest.mark.parametrize("method", PLACED_METHODS)


placed = pytest.mark.parametrize(("method", "backbone"), PLACED)


@placed
def test_off_and_on(method: str, backbone: str) -> None:
    bare = backbones.run(backbones.build(backbone), backbone)
    delta = place(method, backbone)
    model = delta.backbone_model
    randomise(delta)
    changed = backbones.run(model, backbone)
    assert delta.is_attached
    for _ in range(2):
        for _ in range(2):  # a second time is no error
            delta.detach()
            assert not delta.is_attached
            assert torch.equal(backbones.run(model, backbone), bare)
        for _ in range(2):
            delta.attach()
            assert delta.is_attached
            assert torch.equal(backbones.run(model, backbone), changed)


@each_method
def test_module_limits_it_to_that_part(method: str) -> None:
    """Half a delta equals the delta that was made without the other half."""
    whole = place(method, "bert_cls")
    randomise(whole)
    half = place(method, "bert_cls", exclude_modules=["layer.0"])
    randomise(half)
    other_half = place(method, "bert_cls", exclude_modules=["layer.1"])
    randomise(other_half)
    model: Any = whole.backbone_model
    layers = model.bert.encoder.layer
    both = backbones.run(model, "bert_cls")
    whole.detach(layers[0])
    assert whole.is_attached
    assert torch.equal(
        backbones.run(model, "bert_cls"), backbones.run(half.backbone_model, "bert_cls")
    )
    whole.detach(module=layers[1])
    assert not whole.is_attached
    whole.attach(module=layers[0])
    assert torch.equal(
        backbones.run(model, "bert_cls"), backbones.run(other_half.backbone_model, "bert_cls")
    )
    whole.attach(model)
    assert torch.equal(backbones.run(model, "bert_cls"), both)
    whole.detach(model.bert)
    assert torch.equal(
        backbones.run(model, "bert_cls"), backbones.run(backbones.build("bert_cls"), "bert_cls")
    )


def test_the_part_may_be_the_modified_module_itself() -> None:
    model: Any = backbones.build("bert_cls")
    delta = LoraModel(model, modified_modules=["query"])
    delta.detach(model.bert.encoder.layer[0].attention.self.query)
    holding = [name for name, module in model.named_modules() if "lora" in module._modules]
    assert holding == ["bert.encoder.layer.1.attention.self.query"]


def test_a_name_that_begins_alike_is_another_part() -> None:
    model: Any = backbones.build("bert12")
    delta = LoraModel(model, modified_modules=["query"])
    delta.detach(model.encoder.layer[1])
    holding = {name.split(".")[2] for name, m in model.named_modules() if "lora" in m._modules}
    assert holding == {str(i) for i in range(12)} - {"1"}


@pytest.mark.parametrize("call", ["attach", "detach"])
def test_a_part_without_this_delta(call: str) -> None:
    model: Any = backbones.build("bert_cls")
    delta = LoraModel(model, modified_modules=["query"])
    with unchanged(model), pytest.raises(InsertionError, match="classifier"):
        getattr(delta, call)(model.classifier)
    stranger = nn.Linear(1, 1)
    with unchanged(model), pytest.raises(InsertionError, match="Linear"):
        getattr(delta, call)(stranger)


@pytest.mark.parametrize("first", PLACED_METHODS)
@pytest.mark.parametrize("second", ["LoraModel", "AdapterModel", "BitFitModel"])
def test_deltas_attach_and_detach_independently(first: str, second: str) -> None:
    """Any interleaving equals the model that has only what is attached."""
    model = backbones.build("bert_cls")
    a = place(first, "bert_cls", model)
    b = place(second, "bert_cls", model)
    randomise(a)
    randomise(b, 0.1)
    alone_a, alone_b = place(first, "bert_cls"), place(second, "bert_cls")
    randomise(alone_a)
    randomise(alone_b, 0.1)
    expected = {
        (False, False): backbones.run(backbones.build("bert_cls"), "bert_cls"),
        (True, False): backbones.run(alone_a.backbone_model, "bert_cls"),
        (False, True): backbones.run(alone_b.backbone_model, "bert_cls"),
        (True, True): backbones.run(model, "bert_cls"),
    }
    assert len({float(t.sum()) for t in expected.values()}) == (
        3 if first == second == "BitFitModel" else 4
    )
    for on in (
        (True, False),
        (False, False),
        (False, True),
        (True, True),
        (False, True),
        (True, False),
    ):
        for delta, wanted in zip((a, b), on, strict=True):
            if wanted != delta.is_attached:
                (delta.attach if wanted else delta.detach)()
        assert torch.equal(backbones.run(model, "bert_cls"), expected[on]), on


def test_remove_is_for_good() -> None:
    model = backbones.build("mlp")
    bare = backbones.run(model, "mlp")
    delta = place("LoraModel", "mlp", model)
    randomise(delta)
    delta.remove()
    assert torch.equal(backbones.run(model, "mlp"), bare)
    assert opendelta.deltas(model) == []
    for call in (delta.attach, delta.detach, delta.remove):
        with unchanged(model), pytest.raises(InsertionError, match="removed"):
            call()


@placed
def test_the_hooks_are_permanent(method: str, backbone: str) -> None:
    """Off and on move modules and parameters; a compiled or sharded model keeps its hooks."""
    delta = place(method, backbone)

    def hooks() -> dict[str, Any]:
        state = fingerprint(delta.backbone_model)
        return {k: v for k, v in state.items() if k.startswith("hooks") and v}

    before = {k: v for k, v in hooks().items() if "compact" not in k and "adapter" not in k}
    assert before
    delta.detach()
    assert hooks() == before
    delta.attach()
    assert {k: v for k, v in hooks().items() if k in before} == before


def test_an_attached_delta_has_followed_its_host() -> None:
    """In place: an optimizer's references stay good."""
    model = backbones.build("bert_cls")
    delta = place("LoraModel", "bert_cls", model)
    before = list(delta.parameters())
    delta.detach()
    model.to(torch.bfloat16).train()
    delta.attach()
    assert {p.dtype for p in delta.parameters()} == {torch.bfloat16}
    assert all(p is q for p, q in zip(delta.parameters(), before, strict=True))
    assert all(module.training for module in model.modules())


# --- what was exchanged meanwhile ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["BitFitModel", "LoraModel"])
def test_parameters_put_in_place_by_assignment_are_the_deltas(method: str, tmp_path: Path) -> None:
    """After ``load_state_dict(assign=True)`` what is there now trains, is saved and is detached."""
    model, delta = built(method, "bert")
    bare = backbones.run(backbones.build("bert"), "bert")
    randomise(delta)
    expected = backbones.run(model, "bert")
    loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    delta.freeze_module()
    live = {id(p) for p in model.parameters()}
    assert all(id(p) in live for p in delta.parameters())
    assert trainable(model) == {name for name, _ in delta.named_parameters()}
    delta.save_finetuned(tmp_path)
    fresh = backbones.build("bert")
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert torch.equal(backbones.run(fresh, "bert"), expected)
    delta.detach()
    assert torch.equal(backbones.run(model, "bert"), bare)
    delta.attach()
    assert torch.equal(backbones.run(model, "bert"), expected)


@pytest.mark.parametrize("while_attached", [True, False])
def test_what_replaces_and_what_was_replaced_share_a_dtype(while_attached: bool) -> None:
    """A cast reaches the one that is in place; the other follows when it takes its turn."""
    model = linears(2, 4)
    delta = DeltaBase(model)
    delta.replace_module(model, "0", model[0], nn.Linear(4, 4))
    if not while_attached:
        delta.detach()
    model.to(BF16)
    x = torch.randn(2, 4, dtype=BF16)
    for switch in (delta.detach, delta.attach, delta.remove):
        switch()
        assert dtypes(model) == {BF16}
        assert model(x).dtype == BF16


def test_one_delta_at_a_time_is_constructed() -> None:
    """Another thread waits, with its plan as well, for both would change the same tables."""
    made: list[DeltaBase] = []

    class Slow(DeltaBase):
        def __init__(self, backbone_model: nn.Module, modified_modules: Any = None) -> None:
            self._construct()

        def update_module(self, module: nn.Module, key: str) -> None:
            other.start()
            other.join(0.5)
            assert not made
            self.insert_module(module.get_submodule(key), "after", nn.Identity(), "slow")

    model = backbones.build("mlp")
    options = {"modified_modules": ["first"], "lora_r": 1}
    other = threading.Thread(target=lambda: made.append(LoraModel(model, **options)))
    slow = Slow(model, modified_modules=["first"])
    other.join()
    assert opendelta.deltas(model) == [slow, *made] and len(made) == 1


@pytest.mark.parametrize("first_off", [0, 1])
def test_detach_and_attach_keep_the_order_of_parameters(first_off: int) -> None:
    """Two deltas on one module: whichever goes and comes back, parameters are as numbered."""
    model = linears(1)
    pair = [LoraModel(model, modified_modules=["0"]), AdapterModel(model, modified_modules=["0"])]
    before = parameter_names(model)
    for delta in (pair[first_off], pair[1 - first_off]):
        delta.detach()
        delta.attach()
        assert parameter_names(model) == before
    with pair[first_off].detached():
        assert parameter_names(model) != before
    assert parameter_names(model) == before


# --- broken off, and removed ---------------------------------------------------------------------


@pytest.mark.parametrize("call", ["attach", "detach", "remove", "freeze_module"])
def test_a_removed_delta(call: str, model: Any) -> None:
    delta = LoraModel(model, modified_modules=["query"])
    delta.remove()
    with unchanged(model), pytest.raises(OpenDeltaError, match="removed"):
        getattr(delta, call)()
