"""`DeltaBase` as the specification lays it down (1.20.2): signatures, and what each method does."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Callable
from typing import Any

import backbones
import pytest
import torch
from cases import randomise
from placed import METHODS, PLACED, TARGETS, fingerprint, place, unchanged
from torch import Tensor, nn

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    BaseDeltaConfig,
    BitFitModel,
    DeltaBase,
    LoraModel,
    ParallelAdapterModel,
)
from opendelta.exceptions import AddressingError, InsertionError

each_method = pytest.mark.parametrize("method", METHODS)
placed = pytest.mark.parametrize(("method", "backbone"), PLACED)

# --- signatures -----------------------------------------------------------------------------------

BASE = (
    "modified_modules=None, exclude_modules=None, unfrozen_modules=None, common_structure=None, "
    "interactive_modify=False, backend='hf'"
)
LORA_BASE = BASE.replace(
    "exclude_modules=None, unfrozen_modules=None", "unfrozen_modules=None, exclude_modules=None"
)
CONSTRUCTORS = {  # specification 1.21; LoRA's order differs there too
    "LoraModel": "backbone_model, lora_r=8, lora_alpha=16, lora_dropout=0.0, "
    f"{LORA_BASE}, *, rank_pattern=None, alpha_pattern=None",
    "BitFitModel": f"backbone_model, {BASE}",
    "AdapterModel": f"backbone_model, bottleneck_dim=24, non_linearity='gelu_new', {BASE}",
    "LowRankAdapterModel": "backbone_model, reduction_factor=32, non_linearity='gelu_new', "
    f"low_rank_w_init='glorot-uniform', low_rank_rank=1, {BASE}",
    "CompacterModel": f"backbone_model, {BASE}, reduction_factor=16, non_linearity='gelu_new', "
    "phm_c_init='normal', hypercomplex_division=4, learn_phm=True, "
    "hypercomplex_nonlinearity='glorot-uniform', shared_phm_rule=False, factorized_phm=True, "
    "shared_W_phm=False, factorized_phm_rule=False, phm_rank=1, phm_init_range=0.0001, "
    "kronecker_prod=None, use_bias_up_sampler=True, use_bias_down_sampler=True",
    "ParallelAdapterModel": "backbone_model, bottleneck_dim=24, non_linearity='gelu_new', "
    f"scaled=1.0, {BASE}",
}
METHOD_SIGNATURES = {  # specification 1.20.2 and 1.23.1
    "forward": "self, *args, **kwargs",
    "from_config": "config, backbone_model, check_hash=True, **kwargs",
    "add_all_delta_to_backbone": "self, backbone, modified_modules",
    "update_module": "self, module, key",
    "freeze_module": "self, module=None, exclude=None, set_state_dict=True, prefix=''",
    "find_key": "self, key, target_list",
    "find_module": "self, root_module, key",
    "replace_module": "self, parent_module, child_name, child_module, new_module, "
    "delta_name='delta'",
    "modify_module": "self, module",
    "insert_module": "self, module, method='sequential', delta_module=None, delta_name='delta', "
    "strict=False, _delta_info=None",
    "insert_sequential_module": "self, module, delta_module=None, delta_name='delta', "
    "strict=False, _delta_info=None",
    "insert_parallel_module": "self, module, delta_module=None, delta_name='delta', "
    "strict=False, _delta_info=None",
    "set_active_state_dict": "self, module",
    "log": "self, module=None, delta_ratio=True, trainable_ratio=True, visualization=True, "
    "cuda_memory=True",
    "attach": "self, module=None, reset_state_dict=True",
    "detach": "self, module=None, reset_state_dict=True",
    # save_function=None is the one default that differs from 0.3.2
    "save_finetuned": "self, finetuned_delta_path='./delta_checkpoints/', save_config=True, "
    "state_dict=None, save_function=None, push_to_dc=False, center_args={}, center_args_pool={}, "
    "list_tags=[], dict_tags={}, delay_push=False, test_result=None, usage=''",
    "load_checkpoint": "self, path, load_func=None, backbone_model=None",
    "save_checkpoint": "self, path, save_func=None, backbone_model=None",
    "from_finetuned": "finetuned_delta_path, backbone_model, delta_config=None, cache_dir=None, "
    "state_dict=None, *model_args, force_download=False, check_hash=True, "
    "local_files_only=False, **kwargs",
}


def text_of(function: Callable[..., Any], optional_extras: bool = False) -> str:
    """A signature without annotations; `optional_extras` drops keyword-only additions."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    if optional_extras:
        parameters = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return str(inspect.Signature(parameters))[1:-1]


def test_the_base_constructor() -> None:
    assert text_of(DeltaBase) == (
        "backbone_model, modified_modules=None, exclude_modules=None, unfrozen_modules=None, "
        "interactive_modify=False, common_structure=False, backend='hf'"
    )


@each_method
def test_constructors(method: str) -> None:
    assert text_of(getattr(opendelta, method)) == CONSTRUCTORS[method]


@pytest.mark.parametrize("name", METHOD_SIGNATURES)
def test_methods(name: str) -> None:
    for cls in (DeltaBase, *(getattr(opendelta, method) for method in METHODS)):
        extras_allowed = name == "save_finetuned"  # documented or ours, by keyword only
        assert text_of(getattr(cls, name), extras_allowed) == METHOD_SIGNATURES[name]


def test_auto_classes() -> None:
    assert text_of(AutoDeltaConfig.from_dict) == "config_dict, **kwargs"
    assert text_of(AutoDeltaConfig.from_finetuned) == "finetuned_delta_path, **kwargs"
    assert text_of(AutoDeltaModel.from_config) == "config, backbone_model, **kwargs"
    parameters = list(inspect.signature(AutoDeltaModel.from_finetuned).parameters.values())
    assert [p.name for p in parameters[:2]] == ["finetuned_delta_path", "backbone_model"]
    assert {p.kind for p in parameters} >= {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }


def test_configs() -> None:
    assert text_of(BaseDeltaConfig.from_finetuned) == "finetuned_delta_path, **kwargs"
    assert text_of(BaseDeltaConfig.save_finetuned) == "self, save_directory, **kwargs"
    assert text_of(BaseDeltaConfig.from_dict) == "config_dict, **kwargs"
    assert text_of(BaseDeltaConfig.to_dict) == "self"
    assert text_of(BaseDeltaConfig.get_config_dict) == "self"


DEFAULTS = {
    "LoraModel": ["attn.q", "attn.v"],
    "BitFitModel": ["attn", "ff", "layer_norm", "lm_head.proj"],
    "AdapterModel": ["attn", "ff"],
    "LowRankAdapterModel": ["attn", "ff"],
    "CompacterModel": ["attn", "ff"],
    "ParallelAdapterModel": ["attn", "attn", "ff.w1", "ff.w2"],
}


@each_method
def test_default_modified_modules_is_a_public_class_attribute(method: str) -> None:
    cls = getattr(opendelta, method)
    assert cls.default_modified_modules == DEFAULTS[method]
    delta = cls(backbones.build("bert"))
    delta.modified_modules.append("changed")
    assert cls.default_modified_modules == DEFAULTS[method]


def test_arguments_by_position() -> None:
    model = backbones.build("bert")
    delta = LoraModel(model, 3, 6, 0.25, ["query"], ["deltas", "pooler"], ["layer.0"], False)
    assert {tuple(p.shape) for p in delta.parameters()} == {(3, 64), (64, 3)}
    assert (delta.lora_r, delta.lora_alpha, delta.lora_dropout) == (3, 6, 0.25)
    delta.freeze_module()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "encoder.layer.1.attention.self.query.lora.lora_A",
        "encoder.layer.1.attention.self.query.lora.lora_B",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    adapter = AdapterModel(backbones.build("bert"), 5, "relu", ["pooler"])
    assert {p.shape[0] for n, p in adapter.named_parameters() if "down" in n} == {5}


@pytest.mark.parametrize("value", [["name_a"], ("name_a",), "name_a"])
def test_modules_as_list_tuple_or_string(value: Any) -> None:
    assert len(list(LoraModel(backbones.build("toy"), modified_modules=value).parameters())) == 4


# --- what a delta is ------------------------------------------------------------------------------


@placed
def test_its_parameters_are_what_it_added(method: str, backbone: str) -> None:
    model = backbones.build(backbone)
    before = {id(p) for p in model.parameters()}
    delta = place(method, backbone, model)
    assert isinstance(delta, nn.Module)
    added = {name: p for name, p in model.named_parameters() if id(p) not in before}
    own = dict(delta.named_parameters())
    assert own.keys() == added.keys() and own
    assert all(own[name] is added[name] for name in own)
    assert set(delta.state_dict()) == set(own)
    assert delta.backbone_model is model
    assert not {id(m) for m in delta.modules()} & {id(m) for m in backbones_own(model, delta)}


def backbones_own(model: nn.Module, delta: nn.Module) -> list[nn.Module]:
    """The backbone's modules that a delta is not made of."""
    inside = {id(m) for m in delta.modules()}
    own = [m for m in model.modules() if id(m) not in inside]
    assert model in own
    return own


def test_what_is_done_to_a_delta_is_done_to_it_alone() -> None:
    model = backbones.build("bert")
    delta = LoraModel(model, modified_modules=["query"], lora_dropout=0.5)
    delta.requires_grad_(False)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in delta.named_parameters()
    }
    delta.to(torch.float64)
    assert {p.dtype for p in delta.parameters()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.float64, torch.float32}
    delta.train()
    layer: Any = model.encoder.layer[0].attention.self.query
    assert layer.lora.training and not layer.training and not model.training
    model.train()
    delta.eval()
    assert not layer.lora.training and layer.training


@each_method
def test_its_state_dict_moves_a_delta(method: str) -> None:
    """As that of any module."""
    source, target = place(method, "bert_cls"), place(method, "bert_cls")
    randomise(source)
    target.load_state_dict(source.state_dict())
    assert torch.equal(
        backbones.run(target.backbone_model, "bert_cls"),
        backbones.run(source.backbone_model, "bert_cls"),
    )


def test_forward_raises() -> None:
    delta = place("LoraModel", "mlp")
    for call in (delta, delta.forward):
        for arguments in ((), (torch.ones(1),)):
            with pytest.raises(RuntimeError, match="backbone"):
                call(*arguments)
    with pytest.raises(RuntimeError, match="backbone"):
        delta(x=1)


@each_method
def test_the_arguments_are_attributes(method: str) -> None:
    cls = getattr(opendelta, method)
    parameters = inspect.signature(cls).parameters
    delta = place(method, "bert_cls")
    for name in parameters.keys() & {"lora_r", "bottleneck_dim", "scaled", "reduction_factor"}:
        assert getattr(delta, name) == parameters[name].default
    assert delta.modified_modules == TARGETS[method]["bert_cls"]


# --- deltas(backbone) -----------------------------------------------------------------------------


def test_deltas_of_a_backbone_in_order() -> None:
    model = backbones.build("bert_cls")
    assert opendelta.deltas(model) == []
    made = []
    for method in METHODS:
        made.append(place(method, "bert_cls", model))
        assert opendelta.deltas(model) == made
    made[2].detach()
    assert opendelta.deltas(model) == made
    made.pop(2).remove()
    assert opendelta.deltas(model) == made
    assert opendelta.deltas(nn.ModuleDict({"inner": model})) == made
    assert opendelta.deltas(backbones.build("bert_cls")) == []


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    found: nn.Module = torch.load(buffer, weights_only=False)
    return found


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@each_method
def test_deltas_of_a_copy_are_its_own(method: str, copied: Any) -> None:
    model = backbones.build("bert_cls")
    first, second = place(method, "bert_cls", model), place("LoraModel", "bert_cls", model)
    randomise(first)
    twin = copied(model)
    found = opendelta.deltas(twin)
    assert [type(delta) for delta in found] == [type(first), type(second)]
    assert not set(found) & {first, second}
    assert all(delta.backbone_model is twin for delta in found)
    both = backbones.run(model, "bert_cls")
    found[0].detach()
    assert torch.equal(backbones.run(model, "bert_cls"), both)
    first.detach()
    assert torch.equal(backbones.run(twin, "bert_cls"), backbones.run(model, "bert_cls"))


# --- addressing -----------------------------------------------------------------------------------


def test_find_key() -> None:
    delta = LoraModel(backbones.build("toy"), modified_modules=["name_a"])
    assert delta.find_key("name_b.0.name_a", ["name_a"])
    assert delta.find_key("name_b.0.name_a", ["elsewhere", "0.name_a"])
    assert delta.find_key("name_b.0.name_a", "name_b.0.name_a")
    assert delta.find_key("model.encoder.layer.0.attention", ["attention"])
    assert delta.find_key("name_b.0.name_a", [r"[r]\d\.name_a"])
    assert not delta.find_key("name_b.0.name_a", ["name_b", "ame_a", "1.name_a"])
    assert not delta.find_key("name_b.0.name_a", [])


def test_find_key_by_common_names() -> None:
    delta = LoraModel(backbones.build("bert"))
    assert delta.find_key("encoder.layer.0.attention.self.query", ["attn.q"])
    assert not delta.find_key("encoder.layer.0.attention.self.query", ["attn.v"])


def test_find_module() -> None:
    model: Any = backbones.build("toy")
    delta = LoraModel(model, modified_modules=["name_a"])
    parent, name, child = delta.find_module(model, "name_b.0.name_a")
    assert (parent, name, child) == (model.name_b[0], "name_a", model.name_b[0].name_a)
    assert delta.find_module(model, "embedding") == (model, "embedding", model.embedding)
    assert delta.find_module(model, "name_b.1") == (model.name_b, "1", model.name_b[1])
    assert delta.find_module(model.name_b, "1.name_a") == (
        model.name_b[1],
        "name_a",
        model.name_b[1].name_a,
    )


@pytest.mark.parametrize("key", ["name_c", "name_b.2", "name_b.0.name_a.weight", "name_b..name_a"])
def test_find_module_of_a_wrong_name(key: str) -> None:
    model = backbones.build("toy")
    delta = LoraModel(model, modified_modules=["name_a"])
    with unchanged(model), pytest.raises(AddressingError, match=key.replace(".", r"\.")):
        delta.find_module(model, key)


# --- building blocks of methods -------------------------------------------------------------------


def hand(model: nn.Module) -> DeltaBase:
    """A delta that modifies nothing by itself: modules are inserted one by one below."""
    return DeltaBase(model, modified_modules=["first"])


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor


class Plus(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(amount))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.amount


class Around(nn.Module):
    """As 0.3.2's layers were written: it sees all arguments, and the whole output."""

    def __init__(self, before: float = 1.0, after: float = 0.0) -> None:
        super().__init__()
        self.before, self.after = (
            nn.Parameter(torch.tensor(before)),
            nn.Parameter(torch.tensor(after)),
        )

    def pre_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return (x * self.before, *args), kwargs

    def post_forward(self, output: Any) -> Any:
        return output + self.after


class Affine(nn.Module):
    """A module to modify."""

    def forward(self, x: Tensor, offset: float = 1.0) -> Tensor:
        """Documented."""
        return 2 * x + offset


def affine() -> Any:
    return nn.ModuleDict({"first": Affine()})


X = torch.tensor([1.0, 10.0])


def test_sequential_runs_after_a_module() -> None:
    model = affine()
    hand(model).insert_sequential_module(model["first"], Times(3.0))
    assert torch.equal(model["first"](X), 3 * (2 * X + 1))
    assert torch.equal(model["first"](X, offset=5.0), 3 * (2 * X + 5))


def test_sequential_before_and_after() -> None:
    """`pre_forward` maps the arguments, `post_forward` the output, as in 0.3.2."""
    model = affine()
    hand(model).insert_sequential_module(model["first"], Around(before=3.0, after=7.0))
    assert torch.equal(model["first"](X), 2 * (3 * X) + 1 + 7)
    assert torch.equal(model["first"](X, offset=5.0), 2 * (3 * X) + 5 + 7)


def test_one_side_alone() -> None:
    class Before(nn.Module):
        def pre_forward(self, x: Tensor) -> tuple[Any, Any]:
            return (x + 1,), {"offset": 0.0}

    class After(nn.Module):
        def post_forward(self, output: Tensor) -> Tensor:
            return output - 1

    model = affine()
    delta = hand(model)
    delta.insert_sequential_module(model["first"], Before(), "a")
    assert torch.equal(model["first"](X), 2 * (X + 1))
    delta.insert_sequential_module(model["first"], After(), "b")
    assert torch.equal(model["first"](X), 2 * (X + 1) - 1)


def test_parallel_reads_the_arguments_and_adds_to_the_output() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor, offset: float = 0.0) -> Tensor:
            return 100 * x + offset

    model = affine()
    hand(model).insert_parallel_module(model["first"], Branch())
    assert torch.equal(model["first"](X), (2 * X + 1) + 100 * X)
    assert torch.equal(model["first"](X, offset=5.0), (2 * X + 5) + (100 * X + 5))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("sequential", lambda x: 3 * (2 * x + 1)),
        ("after", lambda x: 3 * (2 * x + 1)),
        ("before", lambda x: 2 * (3 * x) + 1),
        ("parallel", lambda x: 2 * x + 1 + 3 * x),
    ],
)
def test_insert_module_by_method(method: str, expected: Callable[[Tensor], Tensor]) -> None:
    model = affine()
    delta = hand(model)
    delta.insert_module(model["first"], method, Times(3.0))
    assert torch.equal(model["first"](X), expected(X))
    delta.detach()
    assert torch.equal(model["first"](X), 2 * X + 1)
    delta.attach()
    assert torch.equal(model["first"](X), expected(X))


def test_insert_module_is_sequential_by_default() -> None:
    model = affine()
    hand(model).insert_module(model["first"], delta_module=Times(3.0))
    assert torch.equal(model["first"](X), 3 * (2 * X + 1))


def test_the_module_stays_the_users_own() -> None:
    """Doc-preserving insertion: nothing about the modified module's forward changes."""
    model = affine()
    first = model["first"]
    signature, attributes = inspect.signature(first.forward), set(vars(first))
    for method in ("before", "after", "parallel", "sequential"):
        hand(model).insert_module(first, method, Times(1.0), method)
    assert type(first) is Affine
    assert inspect.signature(first.forward) == signature
    assert first.forward.__doc__ == "Documented."
    assert first.forward.__func__ is Affine.forward
    assert set(vars(first)) == attributes
    assert dict(first.named_parameters()).keys() == {
        f"{name}.factor" for name in ("before", "after", "parallel", "sequential")
    }


def test_inserts_after_run_in_order_and_inserts_before_in_reverse() -> None:
    model = affine()
    for after_or_before in ("after", "before"):
        for layer in (Times(3.0), Plus(4.0)):
            hand(model).insert_module(model["first"], after_or_before, layer, after_or_before)
    before = 3 * (X + 4)  # the last one inserted goes first
    assert torch.equal(model["first"](X), 3 * (2 * before + 1) + 4)


def test_attaching_again_restores_the_order() -> None:
    model = affine()
    made = []
    for layer in (Times(3.0), Plus(4.0), Times(5.0)):
        made.append(hand(model))
        made[-1].insert_module(model["first"], "after", layer)
    expected = 5 * (3 * (2 * X + 1) + 4)
    assert torch.equal(model["first"](X), expected)
    for order in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
        for position in order:
            made[position].detach()
        assert torch.equal(model["first"](X), 2 * X + 1)
        for position in order:
            made[position].attach()
        assert torch.equal(model["first"](X), expected)


def test_names_of_several_deltas_on_one_module() -> None:
    model = affine()
    made = [hand(model) for _ in range(3)]
    for delta in made:
        delta.insert_module(model["first"], delta_module=Times(2.0), delta_name="thing")
    assert list(model["first"]._modules) == ["thing", "thing_1", "thing_2"]
    made[1].detach()
    fourth = hand(model)
    fourth.insert_module(model["first"], delta_module=Times(2.0), delta_name="thing")
    assert "thing_3" in model["first"]._modules  # a detached delta's name stays its own
    made[1].attach()
    assert set(model["first"]._modules) == {"thing", "thing_1", "thing_2", "thing_3"}
    assert {name for delta in made for name, _ in delta.named_parameters()} == {
        "first.thing.factor"
    }


def test_the_default_name() -> None:
    model = affine()
    hand(model).insert_module(model["first"], delta_module=Times(2.0))
    assert list(model["first"]._modules) == ["delta"]


@pytest.mark.parametrize(
    "insert", ["insert_module", "insert_sequential_module", "insert_parallel_module"]
)
def test_strict_prohibits_modifying_a_modified_module(insert: str) -> None:
    model = affine()
    delta = hand(model)
    getattr(delta, insert)(model["first"], delta_module=Times(2.0), strict=True)
    before = model["first"](X)
    for again in (delta, hand(model)):
        layer = Times(3.0)
        with unchanged(model), pytest.raises(InsertionError, match="strict"):
            getattr(again, insert)(model["first"], delta_module=layer, strict=True)
    assert torch.equal(model["first"](X), before)


def test_strict_sees_a_detached_delta_too() -> None:
    model = affine()
    delta = hand(model)
    delta.insert_module(model["first"], delta_module=Times(2.0))
    delta.detach()
    layer = Times(3.0)
    with unchanged(model), pytest.raises(InsertionError, match="strict"):
        hand(model).insert_module(model["first"], delta_module=layer, strict=True)


def test_delta_info_names_what_to_insert() -> None:
    """0.3.2 passed a delta's facts through it when attaching again."""
    model = affine()
    info = {"method": "before", "delta_module": Times(3.0), "delta_name": "other", "state": "on"}
    hand(model).insert_module(model["first"], _delta_info=info)
    assert list(model["first"]._modules) == ["other"]
    assert torch.equal(model["first"](X), 2 * (3 * X) + 1)


def test_an_inserted_module_follows_its_host() -> None:
    """Dtype and train mode."""
    model = nn.ModuleDict({"first": nn.Linear(2, 2).to(torch.bfloat16)}).eval()
    layer = Times(2.0)
    hand(model).insert_module(model["first"], delta_module=layer)
    assert layer.factor.dtype is torch.bfloat16
    assert not layer.training
    assert model["first"](X.to(torch.bfloat16)).dtype is torch.bfloat16


def test_replace_module() -> None:
    model: Any = backbones.build("mlp")
    bare = backbones.run(model, "mlp")
    original = model.first
    delta = hand(model)
    new = nn.Linear(6, 8)
    delta.replace_module(model, "first", original, new, delta_name="mine")
    assert model.first is new
    assert not hasattr(model, "mine")
    changed = backbones.run(model, "mlp")
    assert not torch.allclose(changed, bare)
    assert {id(p) for p in delta.parameters()} == {id(p) for p in new.parameters()}
    assert {n for n, _ in delta.named_parameters()} == {"first.weight", "first.bias"}
    assert opendelta.deltas(model) == [delta]
    delta.freeze_module()
    assert set(model.state_dict()) == {"first.weight", "first.bias"}
    delta.detach()
    assert model.first is original
    assert torch.equal(backbones.run(model, "mlp"), bare)
    assert set(model.state_dict()) == set(backbones.build("mlp").state_dict())
    delta.attach()
    assert model.first is new
    assert torch.equal(backbones.run(model, "mlp"), changed)
    delta.remove()
    assert model.first is original


def test_replace_module_of_a_wrong_child() -> None:
    model: Any = backbones.build("mlp")
    new = nn.Linear(6, 8)
    delta = hand(model)
    for child_name, child in (("first", model.act), ("nothing", model.first)):
        with unchanged(model), pytest.raises(InsertionError, match=repr(child_name)):
            delta.replace_module(model, child_name, child, new)


def test_a_delta_may_combine_all_kinds_of_changes() -> None:
    model: Any = backbones.build("mlp")
    bare = backbones.run(model, "mlp")
    delta = hand(model)
    delta.replace_module(model, "act", model.act, nn.Tanh())
    delta.insert_module(model.first, "before", Times(0.5))
    delta.insert_module(model.last[1], "parallel", nn.Linear(8, 3))
    changed = backbones.run(model, "mlp")
    assert not torch.allclose(changed, bare)
    delta.detach()
    assert torch.equal(backbones.run(model, "mlp"), bare)
    delta.attach()
    assert torch.equal(backbones.run(model, "mlp"), changed)


def test_what_a_method_must_define() -> None:
    model = affine()
    delta = hand(model)
    with unchanged(model), pytest.raises(NotImplementedError, match="update_module"):
        delta.update_module(model, "first")
    with unchanged(model), pytest.raises(NotImplementedError):
        delta.modify_module(model["first"])


def test_add_all_delta_to_backbone_gives_the_backbone_and_calls_update_module() -> None:
    calls = []

    class Recorder(DeltaBase):
        delta_type = "test_recorder"
        config_class = type("RecorderConfig", (BaseDeltaConfig,), {})

        def update_module(self, module: nn.Module, key: str) -> None:
            calls.append((module, key))
            self.insert_sequential_module(module.get_submodule(key), Times(2.0))

    model = backbones.build("toy")
    delta = Recorder(model, modified_modules=["embedding"])
    assert opendelta.deltas(model) == [] and calls == []
    result = delta.add_all_delta_to_backbone(model, ["name_a", "embedding"])
    assert result is model
    assert calls == [(model, "embedding"), (model, "name_b.0.name_a"), (model, "name_b.1.name_a")]
    assert opendelta.deltas(model) == [delta]


# --- attach and detach ----------------------------------------------------------------------------


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


@pytest.mark.parametrize("first", METHODS)
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


# --- log ------------------------------------------------------------------------------------------


def logged(delta: DeltaBase, capsys: pytest.CaptureFixture[str], **flags: Any) -> str:
    capsys.readouterr()
    delta.log(**flags)
    return capsys.readouterr().out


def test_log_shows_the_tree_and_the_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module()
    text = logged(delta, capsys)
    assert "lora" in text and "query" in text
    own = sum(p.numel() for p in delta.parameters())
    total = sum(p.numel() for p in delta.backbone_model.parameters())
    assert text.count(f"{own}/{total}") == 2  # trainable and delta


@pytest.mark.parametrize("flag", ["delta_ratio", "trainable_ratio", "visualization", "cuda_memory"])
def test_each_part_of_log_can_be_left_out(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    delta = place("LoraModel", "bert_cls")
    every = ("delta_ratio", "trainable_ratio", "visualization", "cuda_memory")
    signs = {
        "delta_ratio": "Delta Parameter Ratio",
        "trainable_ratio": "Trainable Ratio",
        "visualization": "query",
        "cuda_memory": "CUDA Memory",
    }
    without = logged(delta, capsys, **{flag: False})
    assert [name for name in every if signs[name] not in without] == [flag]
    alone = logged(delta, capsys, **{name: name == flag for name in every})
    assert [name for name in every if signs[name] in alone] == [flag]


def test_log_of_a_part_and_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    delta = place("LoraModel", "bert_cls")
    model: Any = delta.backbone_model
    part = logged(delta, capsys, module=model.bert.encoder.layer[0])
    assert "lora" in part and "classifier" not in part
    nothing = {
        "delta_ratio": False,
        "trainable_ratio": False,
        "visualization": False,
        "cuda_memory": False,
    }
    assert logged(delta, capsys, **nothing) == ""
    with unchanged(model):
        logged(delta, capsys)


# --- the specification's walk ---------------------------------------------------------------------


def test_the_toy_network_of_the_specification() -> None:
    """1.15.1: `name_b.0.name_a` of a network that is no transformer."""
    root: Any = backbones.build("toy")
    bare = backbones.run(root, "toy")
    delta = AdapterModel(backbone_model=root, modified_modules=["name_b.0.name_a"])
    assert list(root.name_b[0].name_a._modules) == ["adapter"]
    assert "adapter" not in root.name_b[1].name_a._modules
    randomise(delta)
    assert not torch.allclose(backbones.run(root, "toy"), bare)


def test_composition_of_the_specification() -> None:
    """1.7.2: three deltas on one layer, named in the order of their coming."""
    model: Any = backbones.build("bart")
    AdapterModel(backbone_model=model, modified_modules=["fc2"])
    AdapterModel(backbone_model=model, modified_modules=["fc2"], bottleneck_dim=12)
    opendelta.LowRankAdapterModel(
        backbone_model=model, modified_modules=["fc2"], reduction_factor=12
    )
    assert list(model.encoder.layers[1].fc2._modules) == [
        "adapter",
        "adapter_1",
        "low_rank_adapter",
    ]


def test_bitfit_attaches_and_detaches() -> None:
    """0.3.2 could not."""
    delta = BitFitModel(backbones.build("gpt2"), modified_modules=["attn", "mlp"])
    bare = backbones.run(delta.backbone_model, "gpt2")
    randomise(delta)
    changed = backbones.run(delta.backbone_model, "gpt2")
    delta.detach()
    assert torch.equal(backbones.run(delta.backbone_model, "gpt2"), bare)
    delta.attach()
    assert torch.equal(backbones.run(delta.backbone_model, "gpt2"), changed)
    assert not torch.equal(changed, bare)


def test_class_attributes() -> None:
    assert ParallelAdapterModel.delta_type == "parallel_adapter"
    assert DeltaBase.config_class is BaseDeltaConfig
    assert issubclass(DeltaBase, nn.Module)


# --- the first forward ---------------------------------------------------------------------------


class Bypassed(nn.Module):
    """Reads the weight of one of its linears and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


def test_a_delta_that_the_first_forward_never_reaches_is_named_once() -> None:
    model = Bypassed()
    opendelta.LoraModel(model, modified_modules=["called", "read"], lora_r=1)
    with pytest.warns(opendelta.DeltaWarning, match=r"no effect on it: read\.lora\."):
        model(torch.ones(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 3))


def test_a_delta_that_is_reached_or_detached_is_not_named() -> None:
    model = Bypassed()
    opendelta.LoraModel(model, modified_modules=["called"], lora_r=1)
    unreached = opendelta.LoraModel(model, modified_modules=["read"], lora_r=1)
    unreached.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 3))
