"""A delta's bookkeeping: no name of a backbone, a method or a hyper-parameter collides with it."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import METHODS, put, randomise
from pieces import forward_hooks
from placed import contents, unchanged
from torch import Tensor, nn

import opendelta
from opendelta import AdapterModel, AutoDeltaModel, BaseDeltaConfig, DeltaBase, LoraModel
from opendelta.exceptions import ConfigError

# --- children of the backbone ---------------------------------------------------------------------

TAKEN = (
    "config insertions left_trainable plan attached detached modified_modules backbone_model "
    "lora_r delta_type uses_defaults unfrozen_modules is_merged merge"
).split()


class Named(nn.Module):
    """Its children are called as what a delta has."""

    def __init__(self) -> None:
        super().__init__()
        for name in TAKEN:
            self.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        for name in TAKEN:
            x = x + self._modules[name](x)  # type: ignore[misc]
        return x


def named() -> Named:
    torch.manual_seed(3)
    return Named()


@pytest.mark.parametrize("method", [LoraModel, AdapterModel, opendelta.BitFitModel])
def test_children_called_like_what_a_delta_has(method: Any, tmp_path: Path) -> None:
    model, x = named(), torch.randn(2, 4)
    bare, before = model(x), contents(model)
    delta = method(model, modified_modules=[f"{name}.0" for name in TAKEN])
    assert len(delta.insertions) == len(TAKEN) and delta.backbone_model is model
    assert delta.modified_modules == [f"{name}.0" for name in TAKEN]
    assert delta.unfrozen_modules == [] and not delta.uses_defaults
    assert delta.attached and not delta.detached and not delta.is_merged
    delta.freeze_module(exclude=["deltas", "config.0.weight"])
    assert "config.0.weight" in delta.left_trainable
    model(x).square().sum().backward()
    own = dict(delta.named_parameters())
    assert all(p.grad is not None for p in own.values())
    assert own and all(model.get_parameter(name) is p for name, p in own.items())
    randomise(delta)
    tuned = model(x)
    delta.save_finetuned(tmp_path)
    fresh = named()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert type(loaded) is method and torch.equal(fresh(x), tuned)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (twin,) = opendelta.deltas(copied)
        assert twin.modified_modules == delta.modified_modules and torch.equal(copied(x), tuned)
    delta.detach()
    assert torch.equal(model(x), bare)
    delta.attach()
    assert torch.equal(model(x), tuned)
    delta.remove()
    assert torch.equal(model(x), bare) and contents(model) == before and not forward_hooks(model)


# --- names of hyper-parameters --------------------------------------------------------------------


class Factor(nn.Module):
    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor


def factors(self: Any, module: nn.Module, key: str) -> None:
    target = module.get_submodule(key)
    start = getattr(self, "start", 1.0)
    self.insert_module(target, "after", Factor(self.widths(target)[1], start), "factor")


def test_locals_of_a_constructor_are_its_own() -> None:
    class LocalModel(DeltaBase):
        delta_type = "test_local"
        config_class = type("LocalConfig", (BaseDeltaConfig,), {})
        update_module = factors

        def __init__(self, backbone_model: nn.Module, start: float = 2.0, modified_modules=None):
            half, insertions, config, to, forward = start / 2, 1, 2, 3, 4
            self._construct(locals())
            self.told = (half, insertions, config, to, forward)

    delta: Any = LocalModel(backbones.build("mlp"), modified_modules=["first"])
    assert delta.half().told == (1.0, 1, 2, 3, 4)
    assert {p.dtype for p in delta.parameters()} == {torch.float16}
    assert len(delta.insertions) == 1 and set(delta.config.method_fields) == {"start"}


RESERVED = "insertions half config forward training merge attached _modules plan state_dict".split()


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_names_are_refused_when_the_class_is_made(name: str) -> None:
    source = f"def __init__(self, backbone_model, {name}=1, modified_modules=None): ..."
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    with pytest.raises(ConfigError, match=f"TakenModel.*'{name}'.*give it another name"):
        type("TakenModel", (DeltaBase,), {"delta_type": "t", "__init__": namespace["__init__"]})


def test_a_name_that_a_method_has_itself_may_be_one_of_its_own() -> None:
    """What is added below the base is the method's, as in 0.3.2's subclasses."""

    class Below(LoraModel):
        delta_type = "test_below"
        config_class = type("BelowConfig", (BaseDeltaConfig,), {})

        def __init__(self, backbone_model: nn.Module, lora_r: int = 2, modified_modules=None):
            LoraModel.__init__(self, backbone_model, lora_r, modified_modules=modified_modules)

            self.steps = 0

    delta: Any = Below(backbones.build("mlp"), modified_modules=["first"])
    assert delta.lora_r == 2 and delta.config.lora_r == 2 and delta.lora_alpha == 16
    assert delta.insertions[0].module.lora_A.shape == (2, 6)
    assert {*delta.config.method_fields} == {"lora_r"}


def test_a_hand_written_config_holds_only_what_is_an_argument() -> None:
    class HandConfig(BaseDeltaConfig):
        def __init__(self, start: float = 1.0, strat: float = 1.0, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.start, self.strat = start, strat

    def __init__(self: Any, backbone_model: nn.Module, start: float = 1.0, modified_modules=None):
        self._construct()

    fields = {"delta_type": "test_hand", "config_class": HandConfig, "__init__": __init__}
    with pytest.raises(ConfigError, match="HandConfig has a field 'strat'.*HandModel.*'start'"):
        type("HandModel", (DeltaBase,), fields)


# --- one value ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_no_hyperparameter_is_set_after_construction(method: str) -> None:
    backbone = "bert"
    delta = put(method, backbone, backbones.build(backbone))
    base = ("modified_modules", "exclude_modules", "unfrozen_modules", "common_structure")
    own = [*type(delta).config_class.method_fields]
    assert own or method == "BitFitModel"
    before = delta.config.to_dict()
    for name in (*own, *base):
        was = getattr(delta, name)
        for owner in (delta, delta.config):
            with pytest.raises(ConfigError, match=f"{name}=.*Construct a new delta with {name}"):
                setattr(owner, name, 5)
        assert getattr(delta, name) == was
    assert delta.config.to_dict() == before
    delta.__dict__["own_note"] = 1
    delta.own_other = 2  # type: ignore[assignment]  # any other name is the user's


def test_a_copy_of_a_config_is_the_users() -> None:
    delta = put("LoraModel", "bert", backbones.build("bert"))
    other = type(delta.config).from_dict(delta.config.to_dict())
    other.lora_r = 3
    assert (other.lora_r, delta.lora_r) == (3, 8)


# --- the style of 0.3.2 ---------------------------------------------------------------------------


class Lazy(nn.Module):
    """Its weights are made in its first forward, as 0.3.2's layers did."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start, self.instantiated = start, False

    def post_forward(self, output: Tensor) -> Tensor:
        if not self.instantiated:
            self.factor = nn.Parameter(torch.full(output.shape[-1:], float(self.start)))
            self.instantiated = True
        return output * self.factor


class OldConfig(BaseDeltaConfig):
    def __init__(self, start: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        from opendelta.utils.signature import get_arg_names_inside_func

        for name in get_arg_names_inside_func(self.__init__):
            if not hasattr(self, name):
                setattr(self, name, locals()[name])


class OldModel(DeltaBase):  # registered nowhere
    config_class = OldConfig
    delta_type = "test_old_unregistered"
    default_modified_modules = ["attn"]

    def __init__(
        self,
        backbone_model: nn.Module,
        start: float = 2.0,
        modified_modules: Any = None,
        exclude_modules: Any = None,
        unfrozen_modules: Any = None,
        common_structure: Any = None,
        interactive_modify: Any = False,
    ) -> None:
        DeltaBase.__init__(
            self,
            backbone_model,
            modified_modules=modified_modules,
            exclude_modules=exclude_modules,
            unfrozen_modules=unfrozen_modules,
            common_structure=common_structure,
            interactive_modify=interactive_modify,
        )
        arguments = {"start": start}
        for name in arguments:
            setattr(self, name, arguments[name])
        self.delta_modules = nn.ModuleList()
        self.add_all_delta_to_backbone(self.backbone_model, self.modified_modules)

    def update_module(self, module: nn.Module, key: str) -> None:
        _, _, ref = self.find_module(module, key)
        layer = Lazy(self.start)
        self.delta_modules.append(layer)
        self.insert_sequential_module(ref, delta_module=layer, delta_name="old")


def test_a_class_in_the_style_of_0_3_2(tmp_path: Path) -> None:
    model = backbones.build("mlp")
    bare = backbones.run(model, "mlp")
    delta = OldModel(model, 3.0, ["last.1"])
    torch.testing.assert_close(backbones.run(model, "mlp"), 3 * bare)
    assert delta.start == delta.config.start == 3.0
    delta.freeze_module(exclude=["deltas"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"last.1.old.factor"}
    assert set(model.state_dict()) == {"last.1.old.factor"}
    randomise(delta)
    tuned = backbones.run(model, "mlp")
    delta.save_finetuned(tmp_path)
    delta.detach()
    assert torch.equal(backbones.run(model, "mlp"), bare)
    delta.attach()
    assert torch.equal(backbones.run(model, "mlp"), tuned)
    with pytest.raises(ConfigError, match="start=5.*Construct a new delta"):
        delta.start = 5.0
    assert OldModel.config_class.from_dict({"start": 4.0}).start == 4.0
    fresh = backbones.build("mlp")
    again = OldModel.from_config(delta.config, fresh)
    backbones.run(fresh, "mlp")  # which makes the weights
    again.load_checkpoint(tmp_path)
    assert torch.equal(backbones.run(fresh, "mlp"), tuned)


# --- attached and detached ------------------------------------------------------------------------


def on_mlp() -> tuple[nn.Module, LoraModel, Tensor, Tensor]:
    model = backbones.build("mlp")
    bare = backbones.run(model, "mlp")
    delta = LoraModel(model, modified_modules=["first", "last.1"])
    randomise(delta)
    return model, delta, bare, backbones.run(model, "mlp")


def test_they_are_answers() -> None:
    model, delta, *_ = on_mlp()

    def answers() -> tuple[bool, ...]:
        both = delta.attached, delta.detached
        assert [bool(answer) for answer in both] == [bool(answer()) for answer in both]
        assert [repr(answer) for answer in both] == [repr(bool(answer)) for answer in both]
        assert all(answer == bool(answer) and (not answer) != answer for answer in both)
        return tuple(map(bool, both))

    assert answers() == (True, False)
    delta.detach()
    assert answers() == (False, True)
    delta.attach(model.first)  # type: ignore[arg-type]
    assert answers() == (True, False)
    delta.attach()
    delta.merge()
    assert answers() == (False, False)  # it acts, and not by itself


@pytest.mark.parametrize("called", [True, False])
def test_they_are_blocks(called: bool) -> None:
    model, delta, bare, tuned = on_mlp()

    def block(name: str) -> Any:
        return getattr(delta, name)() if called else getattr(delta, name)

    def acts() -> bool:
        out = backbones.run(model, "mlp")
        assert torch.equal(out, bare) or torch.equal(out, tuned)
        assert delta.is_attached == torch.equal(out, tuned)
        return delta.is_attached

    with block("detached"):
        assert not acts()
        with block("attached"):
            assert acts()
            with block("detached"), block("detached"):
                assert not acts()
            assert acts()
        assert not acts()
    assert acts()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), block("detached"):
            raise error
        assert acts()
        delta.detach()
        with pytest.raises(error), block("attached"):
            raise error
        assert not acts()
        delta.attach()
    one = block("detached")
    with one, one:  # the same object twice
        assert not acts()
    assert acts()
    with block("detached"):
        delta.attach()  # by hand inside: it stays
        assert acts()
    assert acts()


def test_a_part_stays_a_part_after_a_block() -> None:
    model, delta, bare, tuned = on_mlp()
    delta.detach(model.first)  # type: ignore[arg-type]
    half = backbones.run(model, "mlp")
    assert not torch.equal(half, bare) and not torch.equal(half, tuned)
    for block, inside in ((delta.detached, bare), (delta.attached, tuned)):
        with block:
            assert torch.equal(backbones.run(model, "mlp"), inside)
        assert torch.equal(backbones.run(model, "mlp"), half)


def test_blocks_of_a_merged_or_removed_delta_are_refused() -> None:
    model, delta, *_ = on_mlp()
    delta.merge()
    for name in ("attached", "detached"):
        with (
            unchanged(model),
            pytest.raises(opendelta.OpenDeltaError, match="unmerge"),
            getattr(delta, name),
        ):
            pass
    delta.unmerge()
    with delta.detached():
        delta.remove()  # inside: there is nothing to put back
    with pytest.raises(opendelta.OpenDeltaError, match=re.escape("was removed")), delta.attached():
        pass
