"""`DeltaBase` as the specification lays it down (1.20.2): signatures, and what a delta is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import backbones
import pytest
import torch
from cases import METHODS, randomise
from pieces import forward_hooks, linears
from placed import PLACED, PLACED_METHODS, TARGETS, fingerprint, place, told, unchanged
from torch import nn

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    BaseDeltaConfig,
    BitFitModel,
    CompacterModel,
    DeltaBase,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
)

# --- signatures ----------------------------------------------------------------------------------


each_method = pytest.mark.parametrize("method", PLACED_METHODS)


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
        "interactive_modify=False, common_structure=False, backend='hf', *, own_modules=None"
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_constructor_ends_with_own_modules(method: str) -> None:
    *_, last = inspect.signature(getattr(opendelta, method)).parameters.values()
    assert (last.name, last.kind, last.default) == ("own_modules", last.KEYWORD_ONLY, None)


@pytest.mark.parametrize("method", CONSTRUCTORS)
def test_constructors(method: str) -> None:
    text = text_of(getattr(opendelta, method))
    more = ", own_modules=None" if "*, " in CONSTRUCTORS[method] else ", *, own_modules=None"
    assert text == CONSTRUCTORS[method] + more


@pytest.mark.parametrize("name", METHOD_SIGNATURES)
def test_methods(name: str) -> None:
    for cls in (DeltaBase, *(getattr(opendelta, method) for method in PLACED_METHODS)):
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


@pytest.mark.parametrize("method", DEFAULTS)
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


# --- what a delta is -----------------------------------------------------------------------------


placed = pytest.mark.parametrize(("method", "backbone"), PLACED)


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


def test_class_attributes() -> None:
    assert ParallelAdapterModel.delta_type == "parallel_adapter"
    assert DeltaBase.config_class is BaseDeltaConfig
    assert issubclass(DeltaBase, nn.Module)


# --- one more module -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (LoraModel, {}),
        (AdapterModel, {}),
        (LowRankAdapterModel, {"reduction_factor": 2}),
        (CompacterModel, {"reduction_factor": 2}),
        (ParallelAdapterModel, {"modified_modules": ["0", "0"]}),
        (BitFitModel, {}),
    ],
)
def test_one_more_module_after_construction(
    method: Callable[..., DeltaBase], arguments: dict[str, Any]
) -> None:
    """`update_module` puts the method on a further module, which is detached with the rest."""
    model = linears()
    x = torch.randn(3, 8)
    bare = model(x)
    delta = method(model, **{"modified_modules": ["0"], **arguments})
    count = len(list(delta.parameters()))
    delta.update_module(model, "1")
    assert len(list(delta.parameters())) == 2 * count
    randomise(delta)
    changed = model(x)
    delta.detach(module=model[0])
    assert not torch.equal(model(x), bare)
    delta.detach(module=model[1])
    assert torch.equal(model(x), bare)
    delta.attach()
    assert torch.equal(model(x), changed)
    delta.remove()
    assert torch.equal(model(x), bare)
    assert forward_hooks(model) == 0


# --- what its methods refuse ---------------------------------------------------------------------


OTHER: Any = backbones.build("bert_cls")


STRANGER = LoraModel(OTHER, modified_modules=["query"])


LIFE: dict[str, tuple[Callable[[Any, Any], Any], tuple[str, ...]]] = {
    "unknown way to insert": (
        lambda m, d: d.insert_module(m.classifier, "sequentiall", nn.ReLU()),
        ("'sequentiall'", "'sequential'"),
    ),
    "nothing to insert": (
        lambda m, d: d.insert_sequential_module(m.classifier),
        ("delta_module", "NoneType", "Module"),
    ),
    "a function to insert": (
        lambda m, d: d.insert_parallel_module(m.classifier, torch.relu),
        ("delta_module", "Module"),
    ),
    "inserting elsewhere": (
        lambda m, d: d.insert_module(OTHER.classifier, "after", nn.ReLU()),
        ("Linear", "no module of the backbone"),
    ),
    "inserting under a taken name": (
        lambda m, d: d.insert_module(m.classifier, "after", nn.ReLU(), "bias"),
        ("'bias'", "'classifier'", "delta_name"),
    ),
    "a second one, strictly": (
        lambda m, d: d.insert_module(
            m.bert.encoder.layer[0].attention.self.query, "after", nn.ReLU(), strict=True
        ),
        ("query", "lora", "strict"),
    ),
    "replacing nothing": (
        lambda m, d: d.replace_module(m, "clasifier", m.classifier, nn.ReLU()),
        ("'clasifier'",),
    ),
    "replacing another": (
        lambda m, d: d.replace_module(m, "classifier", m.dropout, nn.ReLU()),
        ("'classifier'",),
    ),
    "finding nothing": (lambda m, d: d.find_module(m, "bert.pool.dense"), ("'bert.pool.dense'",)),
    "finding by a number": (lambda m, d: d.find_key("a", 5), ("target_list=5", "list")),
    "freezing elsewhere": (lambda m, d: d.freeze_module(OTHER.classifier), ("Linear", "backbone")),
    "excluding a stranger": (
        lambda m, d: d.freeze_module(exclude=[STRANGER]),
        ("exclude", "delta objects"),
    ),
    "excluding a number": (
        lambda m, d: d.freeze_module(exclude=[5]),
        ("exclude", "int", "patterns"),
    ),
    "excluding one number": (
        lambda m, d: d.freeze_module(exclude=5),
        ("exclude", "int", "patterns"),
    ),
    "excluding an empty pattern": (
        lambda m, d: d.freeze_module(exclude=["deltas", ""]),
        ("exclude", "empty"),
    ),
    "excluding a broken regex": (
        lambda m, d: d.freeze_module(exclude=["[r]*"]),
        ("*", "regular expression"),
    ),
    "trimming elsewhere": (
        lambda m, d: d.set_active_state_dict(OTHER.classifier),
        ("Linear", "backbone"),
    ),
    "detaching elsewhere": (lambda m, d: d.detach(OTHER.classifier), ("Linear", "backbone")),
    "detaching where it is not": (
        lambda m, d: d.detach(m.classifier),
        ("LoraModel", "'classifier'"),
    ),
    "attaching where it is not": (
        lambda m, d: d.attach(m.bert.pooler),
        ("LoraModel", "'bert.pooler'"),
    ),
    "a checkpoint for another": (
        lambda m, d: d.load_checkpoint("x", backbone_model=OTHER),
        ("backbone_model",),
    ),
    "saving another": (
        lambda m, d: d.save_checkpoint("x", backbone_model=OTHER),
        ("backbone_model",),
    ),
    "a checkpoint from nowhere": (lambda m, d: d.load_checkpoint("no/such"), ("no/such",)),
    "adding modules that are not there": (
        lambda m, d: d.add_all_delta_to_backbone(m, ["querry"]),
        ("'querry'", "'query'"),
    ),
}


@pytest.mark.parametrize("case", LIFE)
def test_life(case: str, model: Any) -> None:
    delta = LoraModel(model, modified_modules=["query"])
    delta.freeze_module(exclude=["deltas", "classifier"])
    call, words = LIFE[case]
    other = fingerprint(OTHER)
    with unchanged(model), pytest.raises(Exception) as caught:
        call(model, delta)
    told(caught.value, words)
    after = fingerprint(OTHER)
    assert {k: v for k, v in after.items() if "random" not in k} == {
        k: v for k, v in other.items() if "random" not in k
    }
    delta.detach()
    delta.attach()
