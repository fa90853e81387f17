"""The registry, the auto classes, and methods of one's own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import randomise
from pieces import linears
from placed import PLACED_METHODS, TARGETS, place, unchanged
from torch import nn

import opendelta
from opendelta import (
    AdapterConfig,
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    BackboneMismatchWarning,
    BaseDeltaConfig,
    DeltaBase,
    LoraConfig,
    LoraModel,
    OpenDeltaError,
    gen_model_hash,
)

# --- from_config ---------------------------------------------------------------------------------


each_method = pytest.mark.parametrize("method", PLACED_METHODS)


@each_method
@pytest.mark.parametrize("loader", ["own", "auto"])
@pytest.mark.parametrize("form", ["object", "dict", "plain dict"])
def test_from_config_makes_the_same_delta_as_the_constructor(
    method: str, loader: str, form: str
) -> None:
    made = place(
        method, "bert_cls", exclude_modules=["layer.0"], unfrozen_modules=["classifier", "deltas"]
    )
    source: Any = {
        "object": made.config,
        "dict": made.config.to_dict(),
        "plain dict": {
            "delta_type": made.delta_type,
            "modified_modules": TARGETS[method]["bert_cls"],
            "exclude_modules": ["layer.0"],
            "unfrozen_modules": ["classifier", "deltas"],
        },
    }[form]
    before = json.dumps(source if isinstance(source, dict) else source.to_dict())
    model = backbones.build("bert_cls")
    cls: Any = type(made) if loader == "own" else AutoDeltaModel
    delta = cls.from_config(source, model)
    assert type(delta) is type(made)
    assert delta.backbone_model is model
    assert shapes(delta) == shapes(made)
    made.freeze_module()
    delta.freeze_module()
    assert set(model.state_dict()) == set(made.backbone_model.state_dict())
    assert json.dumps(source if isinstance(source, dict) else source.to_dict()) == before


def shapes(delta: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in delta.named_parameters()}


@pytest.mark.parametrize("cls", [LoraModel, AutoDeltaModel])
def test_keyword_arguments_change_a_value_for_this_once(cls: Any) -> None:
    config = LoraConfig(modified_modules=["query"], lora_r=4)
    for source in (config, config.to_dict()):
        delta = cls.from_config(
            source, backbones.build("bert"), lora_r=2, modified_modules=["value"]
        )
        assert {n.split(".")[-3] for n, _ in delta.named_parameters()} == {"value"}
        assert {p.shape[0] for n, p in delta.named_parameters() if n.endswith("lora_A")} == {2}
        assert (delta.config.lora_r, delta.config.modified_modules) == (2, ["value"])
    assert (config.lora_r, config.modified_modules) == (4, ["query"])


def test_a_dict_without_type_serves_the_class_that_is_asked() -> None:
    """`LoraModel.from_config` needs no `delta_type`."""
    delta = LoraModel.from_config(
        {"modified_modules": ["query"], "lora_r": 3}, backbones.build("bert")
    )
    assert type(delta) is LoraModel and delta.lora_r == 3


@pytest.mark.parametrize("form", [lambda c: c, lambda c: c.to_dict()])
def test_the_hash_is_compared(form: Any) -> None:
    model = backbones.build("bert")
    config = LoraConfig(modified_modules=["query"], backbone_hash=gen_model_hash(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel.from_config(form(config), model)
    for cls in (LoraModel, AutoDeltaModel):
        altered = backbones.build("bert")
        with torch.no_grad():
            altered.pooler.dense.bias[0] += 1
        with pytest.warns(BackboneMismatchWarning) as seen:
            cls.from_config(form(config), altered)
        assert gen_model_hash(altered) in str(seen[0].message)
        assert str(config.backbone_hash) in str(seen[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cls.from_config(form(config), altered, check_hash=False)


def test_from_config_loads_no_weights(tmp_path: Path) -> None:
    saved = place("LoraModel", "bert_cls")
    randomise(saved)
    saved.freeze_module()
    saved.save_finetuned(tmp_path)
    config = AutoDeltaConfig.from_finetuned(tmp_path)
    model = backbones.build("bert_cls")
    delta = AutoDeltaModel.from_config(config, model)
    assert all(not p.any() for n, p in delta.named_parameters() if n.endswith("lora_B"))
    assert torch.equal(
        backbones.run(model, "bert_cls"), backbones.run(backbones.build("bert_cls"), "bert_cls")
    )


@pytest.mark.parametrize(
    "config", [AdapterConfig(modified_modules=["query"]), {"delta_type": "adapter"}]
)
def test_the_config_of_another_method_is_refused(config: Any) -> None:
    model = backbones.build("bert")
    with unchanged(model), pytest.raises(OpenDeltaError, match="AdapterModel.*LoraModel"):
        LoraModel.from_config(config, model)


def test_the_base_class_makes_any_method() -> None:
    delta = DeltaBase.from_config(
        {"delta_type": "adapter", "modified_modules": ["mlp"]}, backbones.build("llama")
    )
    assert type(delta) is AdapterModel


# --- a method of one's own -----------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), start))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.factor


class ScaleConfig(BaseDeltaConfig):
    """Today's style: the fields are read off the model's constructor."""


@opendelta.register
class ScaleModel(DeltaBase):
    delta_type = "test_scale"
    config_class = ScaleConfig
    default_modified_modules = ["first"]

    start: float

    def __init__(
        self,
        backbone_model: nn.Module,
        start: float = 1.0,
        modified_modules: list[str] | None = None,
        exclude_modules: list[str] | None = None,
        unfrozen_modules: list[str] | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
    ) -> None:
        self._construct(locals())

    def update_module(self, module: nn.Module, key: str) -> None:
        _, _, target = self.find_module(module, key)
        _, width = self.widths(target)
        self.insert_sequential_module(target, Scale(width, self.start), delta_name="scale")


class OldScaleConfig(BaseDeltaConfig):
    """As configs were written for 0.3.2."""

    def __init__(self, start: float = 1.0, other: str = "x", **kwargs: Any) -> None:
        from opendelta.utils.signature import get_arg_names_inside_func

        super().__init__(**kwargs)
        for name in get_arg_names_inside_func(self.__init__):
            if not hasattr(self, name):
                setattr(self, name, locals()[name])


class OldScaleModel(DeltaBase):
    """As methods were written for 0.3.2, layers kept in a list of the delta included."""

    config_class = OldScaleConfig
    delta_type = "test_old_scale"
    default_modified_modules = ["attn"]

    def __init__(
        self,
        backbone_model: nn.Module,
        start: float = 1.0,
        other: str = "x",
        modified_modules: list[str] | None = None,
        exclude_modules: list[str] | None = None,
        unfrozen_modules: list[str] | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
    ) -> None:
        from opendelta.utils.signature import get_arg_names_inside_func

        DeltaBase.__init__(
            self,
            backbone_model,
            modified_modules=modified_modules,
            exclude_modules=exclude_modules,
            unfrozen_modules=unfrozen_modules,
            common_structure=common_structure,
            interactive_modify=interactive_modify,
            backend=backend,
        )
        for name in get_arg_names_inside_func(self.__init__):
            if not hasattr(self, name):
                setattr(self, name, locals()[name])
        self.delta_modules = nn.ModuleList()
        self.add_all_delta_to_backbone(self.backbone_model, self.modified_modules)

    def update_module(self, module: nn.Module, key: str) -> None:
        _, _, ref = self.find_module(module, key)
        layer = self.new_module_like(ref)
        self.insert_sequential_module(ref, delta_module=layer, delta_name="scale")

    def new_module_like(self, module: nn.Module) -> nn.Module:
        layer = Scale(module.out_features, self.start)  # type: ignore[arg-type]
        self.delta_modules.append(layer)
        return layer


opendelta.register(OldScaleModel)
OWN = [(ScaleModel, ScaleConfig, "test_scale"), (OldScaleModel, OldScaleConfig, "test_old_scale")]


own_methods = pytest.mark.parametrize(("cls", "config_class", "kind"), OWN, ids=["today", "0.3.2"])


@own_methods
def test_a_method_of_ones_own_acts(cls: Any, config_class: Any, kind: str) -> None:
    model = backbones.build("mlp")
    bare = backbones.run(model, "mlp")
    delta = cls(model, start=2.0, modified_modules=["last.1"])
    assert torch.allclose(backbones.run(model, "mlp"), 2 * bare)
    delta.detach()
    assert torch.equal(backbones.run(model, "mlp"), bare)
    delta.attach()
    delta.freeze_module()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"last.1.scale.factor"}
    assert set(model.state_dict()) == {"last.1.scale.factor"}
    assert opendelta.deltas(model) == [delta]


@own_methods
def test_a_method_of_ones_own_has_a_config(cls: Any, config_class: Any, kind: str) -> None:
    assert config_class().start == 1.0
    config = config_class(start=3.0, modified_modules=["first"])
    assert (config.start, config.modified_modules) == (3.0, ["first"])
    assert config.unfrozen_modules == ["deltas"]
    assert config.to_dict()["delta_type"] == kind
    assert config.to_dict()["start"] == 3.0
    again = AutoDeltaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert type(again) is config_class
    assert again == config and again.start == 3.0
    with pytest.raises(OpenDeltaError, match="'strat'.*'start'"):
        AutoDeltaConfig.from_dict({"delta_type": kind, "strat": 3.0})


@own_methods
def test_a_method_of_ones_own_joins_the_registry(cls: Any, config_class: Any, kind: str) -> None:
    model = backbones.build("mlp")
    delta = AutoDeltaModel.from_config(
        {"delta_type": kind, "start": 3.0, "modified_modules": ["last.1"]}, model
    )
    assert type(delta) is cls
    assert torch.equal(model.last[1].scale.factor, torch.full((3,), 3.0))
    assert delta.config.start == 3.0


@own_methods
def test_a_method_of_ones_own_is_saved_and_loaded(
    cls: Any, config_class: Any, kind: str, tmp_path: Path
) -> None:
    """Under the names that its parameters have in the backbone."""
    from safetensors.torch import load_file

    model = backbones.build("mlp")
    delta = cls(model, start=2.0, modified_modules=["first", "last.1"])
    randomise(delta)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(load_file(tmp_path / "model.safetensors")) == names
    fresh = backbones.build("mlp")
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert type(loaded) is cls
    assert loaded.config.start == 2.0
    assert torch.equal(backbones.run(fresh, "mlp"), backbones.run(model, "mlp"))


def test_aliases_of_a_method() -> None:
    @opendelta.register("test_first_alias", "test_second_alias")
    class Aliased(ScaleModel):
        delta_type = "test_aliased"
        config_class = type("AliasedConfig", (BaseDeltaConfig,), {})

    for name in ("test_aliased", "test_first_alias", "test_second_alias"):
        delta = AutoDeltaModel.from_config(
            {"delta_type": name, "modified_modules": ["first"]}, backbones.build("mlp")
        )
        assert type(delta) is Aliased


def test_a_name_that_is_taken_or_missing_is_refused() -> None:
    with pytest.raises(OpenDeltaError, match="'lora'.*LoraModel"):

        @opendelta.register
        class Thief(ScaleModel):
            delta_type = "lora"
            config_class = type("ThiefConfig", (BaseDeltaConfig,), {})

    assert type(AutoDeltaConfig.from_dict({"delta_type": "lora"})) is LoraConfig
    with pytest.raises(OpenDeltaError, match="delta_type"):

        @opendelta.register
        class Nameless(DeltaBase):
            pass


def test_defining_a_class_again_takes_its_place() -> None:
    """As when a notebook's cell runs twice."""

    def define() -> type[DeltaBase]:
        @opendelta.register
        class Again(ScaleModel):
            delta_type = "test_again"
            config_class = type("AgainConfig", (BaseDeltaConfig,), {})

        return Again

    define()
    second = define()
    made = AutoDeltaModel.from_config(
        {"delta_type": "test_again", "modified_modules": ["first"]}, backbones.build("mlp")
    )
    assert type(made) is second


# --- a config of one's own -----------------------------------------------------------------------


class NarrowConfig(BaseDeltaConfig):
    """Written by hand, without the base fields."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = width


class NarrowModel(DeltaBase):
    config_class = NarrowConfig
    delta_type = "narrow"

    def __init__(
        self, backbone_model: nn.Module, width: int = 1, modified_modules: list[str] | None = None
    ) -> None:
        DeltaBase.__init__(self, backbone_model, modified_modules)
        self.width = width
        self.add_all_delta_to_backbone(self.backbone_model, self.modified_modules)

    def update_module(self, module: nn.Module, key: str) -> None:
        _, _, target = self.find_module(module, key)
        self.insert_sequential_module(target, nn.Linear(8, 8), "narrow")


def test_a_config_that_takes_too_little_leaves_the_backbone_alone() -> None:
    """The config is made before anything is put on the backbone."""
    model = linears(1)
    with unchanged(model), pytest.raises(TypeError, match="modified_modules"):
        NarrowModel(model, modified_modules=["0"])
