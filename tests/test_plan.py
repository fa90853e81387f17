"""`preview`: the plan of a delta, looked at without touching the backbone."""

from __future__ import annotations

import copy
import random
from typing import Any

import backbones
import pytest
import torch
from cases import METHODS, PAIRS, marked, put
from placed import unchanged
from torch import Tensor, nn

import opendelta
from opendelta import AdapterModel, DeltaBase, LoraModel
from opendelta.exceptions import AddressingError, ConfigError, InsertionError, UnknownArgumentError
from opendelta.inspection import num_total_parameters


def carried(delta: DeltaBase) -> list[str]:
    """Names of the modules that carry something of a delta, in the backbone's order, by itself."""
    there = {i.host_name for i in delta.insertions if i.content is not None}
    model = copy.deepcopy(delta.backbone_model)
    for other in opendelta.deltas(model):
        other.remove()
    return [name for name, _ in model.named_modules() if name in there]


@pytest.mark.parametrize(("method", "backbone"), marked(PAIRS))
def test_a_plan_is_what_is_constructed_then(
    method: str, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backbones.build(backbone).train()
    total = num_total_parameters(model)
    with monkeypatch.context() as patch, unchanged(model):
        patch.setattr(opendelta, method, getattr(opendelta, method).preview)  # which `put` calls
        plan: Any = put(method, backbone, model)
        share = plan.share
    text, page = repr(plan), plan._repr_html_()
    delta = put(method, backbone, model)
    assert plan.modules == carried(delta) and plan.modules
    own = {id(p): p.numel() for p in delta.parameters()}
    assert plan.num_parameters == sum(own.values()) > 0
    assert share == pytest.approx(sum(own.values()) / total)
    summary = delta.summary()
    assert [r.pattern for r in plan.summary().rows] == [r.pattern for r in summary.rows]
    assert [r.shape for r in plan.summary().rows] == [r.shape for r in summary.rows]
    for row in summary.rows:
        assert row.pattern in text.replace("\n", "") or len(row.pattern) > 30
    assert f"{sum(own.values()):,}" in text and page.startswith("<table") and "</table>" in page


def test_a_plan_that_is_looked_at_is_not_carried_out() -> None:
    model = backbones.build("bert")
    plan = LoraModel.preview(model)
    with unchanged(model), pytest.raises(InsertionError, match="construct the LoraModel"):
        plan.carry_out()


def test_a_method_that_draws_numbers_by_itself_leaves_the_random_state() -> None:
    class Draws(DeltaBase):
        def __init__(self, backbone_model: nn.Module, modified_modules: Any = None) -> None:
            self._construct()

        def update_module(self, module: nn.Module, key: str) -> None:
            layer = nn.Linear(1, 1)
            torch.randn(3, device="cpu")
            self.insert_module(module.get_submodule(key), "after", layer, "draws")

    model, state = backbones.build("mlp"), torch.get_rng_state()
    Draws.preview(model, modified_modules=["first"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_a_plan_hold_no_values(method: str) -> None:
    """Nor is the backbone's own copied: a parameter that is taken over counts by its shape."""
    model = backbones.build("bert")
    python, numbers = random.getstate(), torch.get_rng_state()
    plan = getattr(opendelta, method).preview(model)
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), numbers)
    for insertion in plan.insertions:
        assert all(p.is_meta for _, p in insertion.named_parameters()), insertion.name
    assert opendelta.deltas(model) == []
    again = getattr(opendelta, method).preview(model)  # as often as one likes
    assert repr(again) == repr(plan)


def test_beside_deltas_that_are_there() -> None:
    model = backbones.build("bert")
    first = LoraModel(model, modified_modules=["query"])
    first.freeze_module()
    with unchanged(model):
        plan = AdapterModel.preview(model, bottleneck_dim=3)
        same = LoraModel.preview(model, modified_modules=["query"])
    assert {i.name for i in same.insertions} == {"lora_1"}
    delta = AdapterModel(model, bottleneck_dim=3)
    assert plan.num_parameters == sum(p.numel() for p in delta.parameters())


def test_widths_that_are_measured_leave_the_backbone_alone() -> None:
    """By one forward, in which dropout, batch statistics and the random state are as found."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.odd = nn.Embedding(9, 5), Odd()
            self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
            self.calls = 0

        def forward(self, ids: Tensor) -> Tensor:
            return self.drop(self.norm(self.odd(self.table(ids))))

    model = Root().train()
    with unchanged(model):
        plan = AdapterModel.preview(model, bottleneck_dim=2, modified_modules=["odd"])
    assert plan.modules == ["odd"] and plan.num_parameters == 2 * 7 + 2 + 7 * 2 + 7


# --- errors are the constructor's -----------------------------------------------------------------


WRONG: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "a pattern of nothing": ({"modified_modules": ["querry"]}, AddressingError),
    "no pattern": ({"modified_modules": []}, AddressingError),
    "an unknown argument": ({"lora_rank": 3}, UnknownArgumentError),
    "a bad type": ({"lora_r": "8"}, ConfigError),
    "a bad value": ({"lora_r": 0}, ConfigError),
    "no linear": ({"modified_modules": ["LayerNorm"]}, InsertionError),
    "an unknown backend": ({"backend": "fsdp"}, ConfigError),
    "both ways to choose": (
        {"modified_modules": ["query"], "interactive_modify": True},
        ValueError,
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_those_of_the_constructor(case: str, model: Any) -> None:
    arguments, kind = WRONG[case]
    said = []
    for make in (LoraModel, LoraModel.preview):
        with unchanged(model), pytest.raises(kind) as caught:
            make(model, **arguments)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


def test_of_what_is_no_model() -> None:
    for make in (LoraModel, LoraModel.preview):
        with pytest.raises(ConfigError, match="backbone_model.*str.*Module"):
            make("bert-base-uncased")  # type: ignore[arg-type]


def test_choosing_on_a_page_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is what such a page counts by: there is nothing to choose in it."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a page was opened")

    monkeypatch.setattr("opendelta.web.select_modules", never)
    for value in (True, 8899):
        with unchanged(model), pytest.raises(ConfigError, match="interactive_modify.*preview"):
            LoraModel.preview(model, interactive_modify=value)


# --- classes of one's own -------------------------------------------------------------------------


class Gain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(width))
        self.noise = torch.rand(1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor


class ByItselfModel(DeltaBase):
    """It inserts in its constructor, module by module, and marks the backbone."""

    def __init__(self, backbone_model: nn.Module, marks: bool = False) -> None:
        DeltaBase.__init__(self, backbone_model)
        for name in ("first", "last.1"):
            target = backbone_model.get_submodule(name)
            self.insert_module(target, "after", Gain(target.out_features), "gain")  # type: ignore[arg-type]
        if marks:
            backbone_model.get_submodule("first").marked = True  # type: ignore[assignment]
            backbone_model.train()
            for p in backbone_model.parameters():
                p.requires_grad_(False)


class OnTheBackboneModel(DeltaBase):
    """It assigns a module on the backbone itself and plans nothing."""

    def __init__(self, backbone_model: nn.Module) -> None:
        DeltaBase.__init__(self, backbone_model)
        backbone_model.act = nn.Sequential(backbone_model.act, Gain(8))  # type: ignore[arg-type]


@pytest.mark.parametrize("marks", [False, True])
def test_a_class_that_inserts_by_itself(marks: bool) -> None:
    model = backbones.build("mlp")
    with unchanged(model):
        plan = ByItselfModel.preview(model, marks=marks)
    delta = ByItselfModel(model)
    assert plan.modules == ["first", "last.1"] == carried(delta)
    assert plan.num_parameters == 8 + 3 == sum(p.numel() for p in delta.parameters())
    assert [(i.host_name, i.name) for i in plan.insertions] == [
        (i.host_name, i.name) for i in delta.insertions
    ]


def test_a_class_that_assigns_on_the_backbone() -> None:
    model = backbones.build("mlp")
    with unchanged(model), pytest.raises(InsertionError, match="OnTheBackboneModel.*no plan"):
        OnTheBackboneModel.preview(model)


def test_a_class_of_ones_own_on_a_backbone_that_carries_deltas() -> None:
    model = backbones.build("mlp")
    LoraModel(model, modified_modules=["first"])
    with unchanged(model):
        assert ByItselfModel.preview(model).modules == ["first", "last.1"]


def test_a_backbone_that_cannot_be_copied() -> None:
    model: Any = backbones.build("mlp")
    model.held = (value for value in "a generator")
    with unchanged(model), pytest.raises(InsertionError, match="MLP cannot be copied.*generator"):
        ByItselfModel.preview(model)
    assert LoraModel.preview(model, modified_modules=["first"]).modules == ["first"]


# --- find_targets ---------------------------------------------------------------------------------


def test_find_targets_after_construction() -> None:
    model = backbones.build("bert")
    delta = LoraModel(model)
    queries = [f"encoder.layer.{n}.attention.self.query" for n in range(2)]
    values = [name.replace("query", "value") for name in queries]
    with unchanged(model):
        assert delta.find_targets(["attn.q", "attn.v"]) == [queries, values]
    named = LoraModel(model, modified_modules=["value"], exclude_modules=["layer.0"])
    with unchanged(model):
        assert named.find_targets(["query", "1.attention.self.value"]) == [queries[1:], values[1:]]
        with pytest.raises(AddressingError, match="'querry'.*'query'"):
            named.find_targets(["querry"])
    delta.detach()
    assert delta.find_targets(["attn.q"])[0] == queries
    # What is no module of the backbone's is no target: the deltas' own are not found.
    with pytest.raises(AddressingError):
        named.find_targets(["lora"])
