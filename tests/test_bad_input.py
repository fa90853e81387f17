"""Errors that teach, and leave the backbone exactly as it was.

Each case names words that its message must hold: the bad value, what was expected, and the nearest
valid choice where there is one.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import randomise
from placed import METHODS, fingerprint, place, unchanged
from safetensors.torch import load_file, save_file
from torch import nn

import opendelta
from opendelta import (
    AdapterConfig,
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    BaseDeltaConfig,
    BitFitModel,
    CompacterModel,
    DeltaBase,
    LoraConfig,
    LoraModel,
    LowRankAdapterModel,
    OpenDeltaError,
    ParallelAdapterModel,
)

Call = Callable[[Any], Any]


def backbone(carrying: bool) -> Any:
    """A classifier in train mode with a frozen parameter, bare or with three deltas on it."""
    model: Any = backbones.build("bert_cls").train()
    model.bert.pooler.dense.bias.requires_grad = False
    if carrying:
        lora = LoraModel(model, modified_modules=["key"], lora_r=2)
        randomise(lora)
        AdapterModel(model, modified_modules=["intermediate"], bottleneck_dim=2).detach()
        BitFitModel(model, modified_modules=["0.output"])
        lora.freeze_module(exclude=["deltas", "classifier"])
    return model


@pytest.fixture(params=[False, True], ids=["bare", "carrying"])
def model(request: pytest.FixtureRequest) -> Any:
    return backbone(request.param)


def told(error: BaseException, words: tuple[str, ...]) -> None:
    """Check that the library itself speaks, and that its message holds the words."""
    assert isinstance(error, OpenDeltaError), repr(error)
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{missing} not in {error}"


# --- the fingerprint itself -----------------------------------------------------------------------

CHANGES: dict[str, Call] = {
    "a value": lambda m: m.classifier.bias.data.add_(1),
    "a parameter": lambda m: setattr(
        m.classifier, "bias", nn.Parameter(m.classifier.bias.detach())
    ),
    "requires_grad": lambda m: m.classifier.bias.requires_grad_(False),
    "a gradient": lambda m: setattr(m.classifier.bias, "grad", torch.ones(3)),
    "a buffer": lambda m: m.bert.embeddings.position_ids.add_(1),
    "a train mode": lambda m: m.bert.encoder.eval(),
    "a forward hook": lambda m: m.bert.register_forward_hook(lambda *_: None),
    "a pre-hook": lambda m: m.bert.register_forward_pre_hook(lambda *_: None),
    "a state-dict hook": lambda m: m.register_state_dict_post_hook(lambda *_: None),
    "a load hook": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
    "a submodule": lambda m: m.bert.register_module("new", nn.ReLU()),
    "an attribute": lambda m: setattr(m.bert, "new", 1),
    "a forward": lambda m: setattr(m.bert, "forward", m.bert.forward),
    "a class": lambda m: setattr(m.classifier, "__class__", type("Other", (nn.Linear,), {})),
    "the random state": lambda m: torch.rand(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_sees(change: str) -> None:
    model = backbone(carrying=False)
    before = fingerprint(model)
    assert fingerprint(model) == before
    CHANGES[change](model)
    assert fingerprint(model) != before


# --- constructing ---------------------------------------------------------------------------------


class Shadowing(DeltaBase):
    """A method that inserts its layer under a given name, after a good one."""

    delta_type = "test_shadowing"
    config_class = type("ShadowingConfig", (BaseDeltaConfig,), {})

    def __init__(self, backbone_model: nn.Module, name: str, modified_modules: Any = None) -> None:
        self._construct(locals())

    def update_module(self, module: nn.Module, key: str) -> None:
        target = module.get_submodule(key)
        self.insert_sequential_module(target, nn.Linear(64, 64), delta_name="fine")
        self.insert_sequential_module(target, nn.Linear(64, 64), delta_name=self.name)  # type: ignore[arg-type]


def q(m: Any, cls: Any = LoraModel, **kwargs: Any) -> Any:
    """The class on the queries."""
    return cls(m, **{"modified_modules": ["query"], **kwargs})


CONSTRUCTIONS: dict[str, tuple[Call, tuple[str, ...]]] = {
    # unknown arguments
    "argument of nobody": (lambda m: q(m, lora_rank=4), ("'lora_rank'", "'lora_r'")),
    "argument of another": (lambda m: q(m, AdapterModel, lora_r=4), ("'lora_r'", "bottleneck_dim")),
    "misspelt target": (lambda m: LoraModel(m, modified_module=["query"]), ("'modified_modules'",)),
    # wrong types
    "text for int": (lambda m: q(m, lora_r="8"), ("lora_r='8'", "str", "int")),
    "float for int": (lambda m: q(m, lora_r=2.5), ("lora_r=2.5", "float", "int")),
    "bool for int": (lambda m: q(m, lora_r=True), ("lora_r=True", "bool", "int")),
    "none for int": (
        lambda m: q(m, AdapterModel, bottleneck_dim=None),
        ("bottleneck_dim=None", "int"),
    ),
    "text for float": (lambda m: q(m, lora_dropout="0.1"), ("lora_dropout='0.1'", "float")),
    "int for text": (lambda m: q(m, AdapterModel, non_linearity=1), ("non_linearity=1", "str")),
    "text for bool": (lambda m: q(m, CompacterModel, learn_phm="no"), ("learn_phm='no'", "bool")),
    "list for dict": (lambda m: q(m, rank_pattern=["query"]), ("rank_pattern=['query']", "dict")),
    "int for patterns": (
        lambda m: LoraModel(m, modified_modules=5),
        ("modified_modules=5", "list"),
    ),
    "ints for patterns": (
        lambda m: LoraModel(m, modified_modules=[5]),
        ("modified_modules=[5]", "list[str]"),
    ),
    "int to exclude": (lambda m: q(m, exclude_modules=5), ("exclude_modules=5", "list")),
    "ints to exclude": (lambda m: q(m, exclude_modules=[5]), ("exclude_modules=[5]", "list[str]")),
    "ints to unfreeze": (
        lambda m: q(m, unfrozen_modules=[None]),
        ("unfrozen_modules=[None]", "list[str]"),
    ),
    "text for common structure": (
        lambda m: q(m, common_structure="yes"),
        ("common_structure='yes'", "bool"),
    ),
    "class for backbone": (lambda m: q(type(m)), ("backbone_model", "type", "Module")),
    "text for backbone": (lambda m: q("bert"), ("backbone_model", "str", "Module")),
    "backend": (lambda m: q(m, backend="hff"), ("backend='hff'", "'hf'")),
    # values out of range
    "rank 0": (lambda m: q(m, lora_r=0), ("0", "1 or more")),
    "dropout 1": (lambda m: q(m, lora_dropout=1.0), ("lora_dropout=1.0", "[0, 1)")),
    "dropout below 0": (lambda m: q(m, lora_dropout=-0.1), ("lora_dropout=-0.1", "[0, 1)")),
    "rank 0 by pattern": (lambda m: q(m, rank_pattern={"query": 0}), ("0", "1 or more")),
    "bottleneck 0": (
        lambda m: q(m, AdapterModel, bottleneck_dim=0),
        ("bottleneck_dim=0", "1 or more"),
    ),
    "reduction 0": (
        lambda m: q(m, LowRankAdapterModel, reduction_factor=0),
        ("reduction_factor=0", "1 or more"),
    ),
    "low rank 0": (
        lambda m: q(m, LowRankAdapterModel, low_rank_rank=0),
        ("low_rank_rank=0", "1 or more"),
    ),
    "division of nothing": (
        lambda m: q(m, CompacterModel, hypercomplex_division=3),
        ("64", "hypercomplex_division=3"),
    ),
    "division 0": (
        lambda m: q(m, CompacterModel, hypercomplex_division=0),
        ("hypercomplex_division", "1 or more"),
    ),
    "phm rank 0": (lambda m: q(m, CompacterModel, phm_rank=0), ("phm_rank", "1 or more")),
    # unknown names
    "activation": (
        lambda m: q(m, AdapterModel, non_linearity="gelu_mew"),
        ("'gelu_mew'", "'gelu_new'"),
    ),
    "low-rank start": (
        lambda m: q(m, LowRankAdapterModel, low_rank_w_init="glorot_uniform"),
        ("low_rank_w_init='glorot_uniform'", "'glorot-uniform'"),
    ),
    "phm start": (
        lambda m: q(m, CompacterModel, phm_c_init="gauss"),
        ("phm_c_init='gauss'", "'normal'"),
    ),
    "W start": (
        lambda m: q(m, CompacterModel, hypercomplex_nonlinearity="glorot"),
        ("hypercomplex_nonlinearity='glorot'", "'glorot-uniform'"),
    ),
    # targets that are not there
    "no match": (lambda m: LoraModel(m, modified_modules=["querry"]), ("'querry'", "'query'")),
    "one of two": (
        lambda m: LoraModel(m, modified_modules=["query", "valu"]),
        ("'valu'", "'value'"),
    ),
    "empty pattern": (lambda m: LoraModel(m, modified_modules=["query", " "]), ("empty",)),
    "broken regex": (
        lambda m: LoraModel(m, modified_modules=["[r](query"]),
        ("(query", "regular expression"),
    ),
    "all excluded": (lambda m: q(m, exclude_modules=["encoder"]), ("exclude_modules", "query")),
    "rank of no target": (lambda m: q(m, rank_pattern={"valu": 2}), ("rank_pattern", "'valu'")),
    "alpha of no target": (lambda m: q(m, alpha_pattern={"key": 2.0}), ("alpha_pattern", "'key'")),
    # targets that cannot be modified
    "LoRA on a norm": (
        lambda m: LoraModel(m, modified_modules=["LayerNorm"]),
        ("LayerNorm", "linear"),
    ),
    "LoRA on a dropout": (
        lambda m: LoraModel(m, modified_modules=["dropout"]),
        ("dropout", "linear"),
    ),
    "LoRA on a good and a bad one": (
        lambda m: LoraModel(m, modified_modules=["query", "pooler.activation"]),
        ("pooler.activation", "Tanh", "linear"),
    ),
    "BitFit on a dropout": (
        lambda m: BitFitModel(m, modified_modules=["classifier", "dropout"]),
        ("dropout", "bias"),
    ),
    "adapter on a list": (
        lambda m: AdapterModel(m, modified_modules=["output.dense", "layer"]),
        ("layer", "never calls"),
    ),
    "parallel on a table": (
        lambda m: ParallelAdapterModel(m, modified_modules=["word_embeddings", "word_embeddings"]),
        ("word_embeddings", "Embedding"),
    ),
    "parallel without pairs": (
        lambda m: ParallelAdapterModel(m, modified_modules=["query"]),
        ("pairs", "['query']"),
    ),
    "parallel of unequal pairs": (
        lambda m: ParallelAdapterModel(m, modified_modules=["query", "0.attention.self.value"]),
        ("'query'", "2", "1"),
    ),
    # names that a module has already
    "shadowing a parameter": (
        lambda m: q(m, Shadowing, name="weight"),
        ("'weight'", "Linear", "delta_name"),
    ),
    "shadowing an attribute": (
        lambda m: q(m, Shadowing, name="in_features"),
        ("'in_features'", "delta_name"),
    ),
    "shadowing a method": (lambda m: q(m, Shadowing, name="forward"), ("'forward'", "delta_name")),
    "shadowing a flag": (lambda m: q(m, Shadowing, name="training"), ("'training'", "delta_name")),
    "no name at all": (lambda m: q(m, Shadowing, name="two words"), ("'two words'",)),
    "a dotted name": (lambda m: q(m, Shadowing, name="a.b"), ("'a.b'",)),
    # by config
    "from a type that is none": (
        lambda m: AutoDeltaModel.from_config({"delta_type": "lorra"}, m),
        ("'lorra'", "'lora'"),
    ),
    "from a field that is none": (
        lambda m: AutoDeltaModel.from_config({"delta_type": "lora", "lora_rr": 2}, m),
        ("'lora_rr'", "'lora_r'"),
    ),
    "by an override that is none": (
        lambda m: LoraModel.from_config(LoraConfig(), m, lora_rr=2),
        ("'lora_rr'", "'lora_r'"),
    ),
    "from text": (lambda m: AutoDeltaModel.from_config("some/folder", m), ("str",)),
    "from None": (lambda m: LoraModel.from_config(None, m), ("None",)),
    "from another's": (
        lambda m: LoraModel.from_config(AdapterConfig(), m),
        ("AdapterModel", "LoraModel"),
    ),
    "from a bad value": (
        lambda m: AutoDeltaModel.from_config(
            {"delta_type": "lora", "modified_modules": ["query"], "lora_r": "2"}, m
        ),
        ("lora_r='2'", "int"),
    ),
    "from a newer version's": (
        lambda m: AutoDeltaModel.from_config(
            {"delta_type": "lora", "opendelta_version": "999.0"}, m
        ),
        ("999.0", "newer", opendelta.__version__),
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_construction(case: str, model: Any) -> None:
    call, words = CONSTRUCTIONS[case]
    with unchanged(model), pytest.raises(Exception) as caught:
        call(model)
    told(caught.value, words)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_argument_of_any_method(method: str, model: Any) -> None:
    cls = getattr(opendelta, method)
    with unchanged(model), pytest.raises(TypeError) as caught:
        cls(model, exclude_module=["x"])
    told(caught.value, (method, "'exclude_module'", "'exclude_modules'"))


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_match_of_any_method(method: str, model: Any) -> None:
    twice = ["output.danse", "output.danse"]
    with unchanged(model), pytest.raises(ValueError) as caught:
        getattr(opendelta, method)(model, modified_modules=twice)
    told(caught.value, ("'output.danse'", "output.dense"))


def test_choosing_modules_twice(model: Any) -> None:
    """The page and the list both choose the modules (specification: a ValueError)."""
    with unchanged(model), pytest.raises(ValueError, match=r"interactive_modify.*modified_modules"):
        LoraModel(model, modified_modules=["query"], interactive_modify=True)


NO_DEFAULTS = "(?i)available models with default configurations are .*'modified_modules'"


def test_a_network_without_the_default_roles() -> None:
    model = backbones.build("mlp")
    for method in METHODS:
        with unchanged(model), pytest.raises(OpenDeltaError, match=NO_DEFAULTS):
            getattr(opendelta, method)(model)


def test_transposed_convolutions_and_read_projections() -> None:
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose1d(4, 4, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "fine": nn.Linear(4, 4),
        }
    )
    for pattern, words in (
        ("up", ("'up'", "ConvTranspose1d", "transposed")),
        ("out_proj", ("attention.out_proj", "never called", "'attention'")),
    ):
        with unchanged(model), pytest.raises(OpenDeltaError) as caught:
            LoraModel(model, modified_modules=["fine", pattern])
        told(caught.value, words)


def test_an_error_while_inserting_undoes_what_was_inserted(model: Any) -> None:
    """The plan is carried out whole or not at all, interrupts included."""
    module = model.classifier

    class Breaking(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: str, value: Any) -> None:
            raise KeyboardInterrupt

    kept = module._modules
    before = fingerprint(model)
    object.__setattr__(module, "_modules", Breaking())
    try:
        with pytest.raises(KeyboardInterrupt):
            LoraModel(model, modified_modules=["query", "classifier"])
    finally:
        object.__setattr__(module, "_modules", kept)
    assert fingerprint(model) == before


@pytest.mark.parametrize("place", ["query", "classifier"])
@pytest.mark.parametrize("act", ["attach", "detach", "remove"])
def test_a_switch_that_breaks_off_switches_nothing(model: Any, act: str, place: str) -> None:
    class Breaking(dict):  # type: ignore[type-arg]
        def _refuse(self, *_: Any) -> None:
            raise KeyboardInterrupt

        __setitem__ = __delitem__ = _refuse

    delta = LoraModel(model, modified_modules=["query", "classifier"])
    if act == "attach":
        delta.detach()
    before = [insertion.attached for insertion in delta.insertions]
    assert len(set(before)) == 1 and len(before) > 2
    module = next(m for name, m in model.named_modules() if name.endswith(place))
    kept = module._modules
    object.__setattr__(module, "_modules", Breaking(kept))
    try:
        with pytest.raises(KeyboardInterrupt):
            getattr(delta, act)()
    finally:
        object.__setattr__(module, "_modules", kept)
    assert [insertion.attached for insertion in delta.insertions] == before
    assert opendelta.deltas(model)[-1] is delta
    getattr(delta, act)()
    assert delta.is_attached == (act == "attach")


# --- building blocks, and the life of a delta -----------------------------------------------------

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


@pytest.mark.parametrize("call", ["attach", "detach", "remove", "freeze_module"])
def test_a_removed_delta(call: str, model: Any) -> None:
    delta = LoraModel(model, modified_modules=["query"])
    delta.remove()
    with unchanged(model), pytest.raises(OpenDeltaError, match="removed"):
        getattr(delta, call)()


# --- configs --------------------------------------------------------------------------------------

CONFIG_TEXTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no JSON": ("{'delta_type': 'lora'}", ("config.json", "JSON")),
    "cut short": ('{"delta_type": "lora", "lor', ("config.json", "JSON")),
    "empty": ("", ("config.json", "JSON")),
    "a list": ('["delta_type"]', ("config.json", "delta_type")),
    "a backbone's": (
        '{"model_type": "gpt2", "n_layer": 2}',
        ("config.json", "'gpt2'", "delta_type"),
    ),
    "of an unknown method": ('{"delta_type": "adaptor"}', ("'adaptor'",)),
    "with an unknown field": ('{"delta_type": "lora", "lora_rnak": 8}', ("'lora_rnak'", "'lora_r")),
    "of a newer version": (
        '{"delta_type": "lora", "opendelta_version": "42.1.0", "new_field": 1}',
        ("42.1.0", "newer", opendelta.__version__),
    ),
    "of no version": (
        '{"delta_type": "lora", "opendelta_version": "latest"}',
        ("'latest'", "version"),
    ),
}


@pytest.mark.parametrize("case", CONFIG_TEXTS)
def test_config_files(case: str, model: Any, tmp_path: Path) -> None:
    text, words = CONFIG_TEXTS[case]
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    (tmp_path / "config.json").write_text(text)
    for call in (
        lambda: AutoDeltaConfig.from_finetuned(tmp_path),
        lambda: LoraConfig.from_finetuned(tmp_path),
        lambda: AutoDeltaModel.from_finetuned(tmp_path, model),
        lambda: LoraModel.from_finetuned(tmp_path, model),
    ):
        with unchanged(model), pytest.raises(Exception) as caught:
            call()
        told(caught.value, words)


def test_a_config_that_is_not_there(model: Any, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        for call in (
            lambda folder=folder: AutoDeltaConfig.from_finetuned(folder),
            lambda folder=folder: AutoDeltaModel.from_finetuned(folder, model),
        ):
            with unchanged(model), pytest.raises(OpenDeltaError, match=re.escape(str(folder))):
                call()


def test_the_config_of_another_method(model: Any, tmp_path: Path) -> None:
    AdapterConfig().save_finetuned(tmp_path)
    with pytest.raises(OpenDeltaError, match="'adapter'.*'lora'"):
        LoraConfig.from_finetuned(tmp_path)
    with unchanged(model), pytest.raises(OpenDeltaError, match="AdapterModel.*LoraModel"):
        LoraModel.from_finetuned(tmp_path, model)


@pytest.mark.parametrize("value", [None, "lora", ["delta_type", "lora"], 5])
def test_configs_from_what_is_no_dict(value: Any) -> None:
    for cls in (AutoDeltaConfig, LoraConfig):
        with pytest.raises(OpenDeltaError, match=f"dict.*{type(value).__name__}"):
            cls.from_dict(value)


def test_saving_a_config_badly(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("x")
    with pytest.raises(OpenDeltaError, match="a file"):
        LoraConfig().save_finetuned(file)
    with pytest.raises(OpenDeltaError, match="'ovrewrite'"):
        LoraConfig().save_finetuned(tmp_path, ovrewrite=True)
    assert file.read_text() == "x" and not (tmp_path / "config.json").exists()


# --- weights --------------------------------------------------------------------------------------


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.file, "exploded"))


@pytest.fixture(params=["safetensors", "torch"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A good delta with a trained classifier, in either format."""
    delta = place("LoraModel", "bert_cls")
    randomise(delta)
    delta.freeze_module(exclude=["deltas", "classifier"])
    function = torch.save if request.param == "torch" else None
    delta.save_finetuned(tmp_path, save_function=function)
    return tmp_path


def weights_file(folder: Path) -> Path:
    (file,) = (path for path in folder.iterdir() if path.name != "config.json")
    return file


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors in a folder's weights file."""
    file = weights_file(folder)
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    else:
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)


def exchange(tensors: dict[str, torch.Tensor], **new: torch.Tensor) -> None:
    """Put other tensors in the place of all."""
    tensors.clear()
    tensors.update({name.replace("__", "."): tensor for name, tensor in new.items()})


def without_checksum(folder: Path) -> None:
    """As in a folder that 0.3.2 wrote, where only the file itself can tell."""
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))


def cut(folder: Path, share: float) -> None:
    content = weights_file(folder).read_bytes()
    weights_file(folder).write_bytes(content[: int(len(content) * share)])


A_KEY = "bert.encoder.layer.1.attention.self.value.lora.lora_B"
DAMAGES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "empty": (lambda f: cut(f, 0), ("cannot be read",)),
    "cut early": (lambda f: cut(f, 0.01), ("cannot be read",)),
    "cut late": (lambda f: cut(f, 0.95), ("cannot be read",)),
    "text": (lambda f: weights_file(f).write_text("<html>not found</html>"), ()),
    "a key less": (lambda f: rewrite(f, lambda t: t.pop(A_KEY)), ("missing", A_KEY)),
    "a classifier less": (
        lambda f: rewrite(f, lambda t: t.pop("classifier.bias")),
        ("missing", "classifier.bias"),
    ),
    "a key more": (
        lambda f: rewrite(f, lambda t: t.update({"head.weight": torch.ones(1)})),
        ("unexpected", "head.weight"),
    ),
    "another model's": (
        lambda f: rewrite(f, lambda t: exchange(t, transformer__wte__weight=torch.ones(2, 2))),
        ("missing", "unexpected", "transformer.wte.weight", "lora_A"),
    ),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({A_KEY: torch.ones(64, 3)})),
        (A_KEY, "(64, 3)", "(64, 8)"),
    ),
    "no keys": (lambda f: rewrite(f, lambda t: t.clear()), ("missing", "lora_A")),
}
READABLE = (
    "a key less",
    "a classifier less",
    "a key more",
    "another model's",
    "another shape",
    "no keys",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_files(damage: str, folder: Path, model: Any) -> None:
    hurt, words = DAMAGES[damage]
    hurt(folder)
    without_checksum(folder)
    if damage not in READABLE:
        words = (*words, weights_file(folder).name)
    for cls in (AutoDeltaModel, LoraModel):
        with unchanged(model), pytest.raises(RuntimeError) as caught:
            cls.from_finetuned(folder, model)
        told(caught.value, words)
    if damage == "a classifier less":
        return  # the config's list says that it belongs to the file; here no config is read
    target = place("LoraModel", "bert_cls", model)
    target.freeze_module(exclude=["deltas", "classifier"])
    for path in (folder, weights_file(folder)):
        with unchanged(model), pytest.raises(RuntimeError) as caught:
            target.load_checkpoint(path)
        told(caught.value, words)


@pytest.mark.parametrize("damage", ["cut late", "a key more", "another shape"])
def test_a_file_that_was_exchanged_is_told_by_its_sha256(damage: str, folder: Path) -> None:
    DAMAGES[damage][0](folder)
    model = backbone(carrying=False)
    with unchanged(model), pytest.raises(RuntimeError, match="sha256") as caught:
        AutoDeltaModel.from_finetuned(folder, model)
    told(caught.value, (weights_file(folder).name, "config.json"))


def test_weights_that_are_not_there(folder: Path, model: Any) -> None:
    weights_file(folder).unlink()
    with unchanged(model), pytest.raises(OpenDeltaError) as caught:
        AutoDeltaModel.from_finetuned(folder, model)
    told(caught.value, (str(folder), "model.safetensors", "pytorch_model.bin"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.anything"])
def test_a_pickle_that_would_run_code(name: str, tmp_path: Path, model: Any) -> None:
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module()
    delta.save_finetuned(tmp_path, save_function=torch.save)
    without_checksum(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    proof, file = tmp_path / "proof", tmp_path / name
    for dump in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))):
        for content in ({"a": Bomb(proof)}, Bomb(proof)):
            dump(content, file)
            target = place("LoraModel", "bert_cls", model)
            calls = [lambda target=target: target.load_checkpoint(file)]
            if name == "pytorch_model.bin":
                calls.append(lambda: AutoDeltaModel.from_finetuned(tmp_path, model))
                calls.append(lambda target=target: target.load_checkpoint(tmp_path))
            for call in calls:
                with unchanged(model), pytest.raises(RuntimeError) as caught:
                    call()
                told(caught.value, (name, ".safetensors"))
                assert not proof.exists()
            target.remove()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        {"a": 1},
        {1: torch.ones(1)},
        torch.ones(1),
        {"a": {"b": torch.ones(1)}},
        "text",
    ],
    ids=lambda content: type(content).__name__,
)
def test_a_plain_file_of_something_else(content: Any, tmp_path: Path, model: Any) -> None:
    torch.save(content, tmp_path / "x.bin")
    target = place("LoraModel", "bert_cls", model)
    with unchanged(model), pytest.raises(RuntimeError) as caught:
        target.load_checkpoint(tmp_path / "x.bin")
    told(caught.value, ("x.bin", "dict of tensors"))


def test_a_reader_that_fails_or_gives_nonsense(tmp_path: Path, model: Any) -> None:
    target = place("LoraModel", "bert_cls", model)
    (tmp_path / "x").write_text("x")

    def fail(path: str) -> Any:
        raise KeyError("no such format")

    for read, words in (
        (fail, ("x", "no such format")),
        (lambda path: [1], ("x", "dict of tensors")),
    ):
        with unchanged(model), pytest.raises(RuntimeError) as caught:
            target.load_checkpoint(tmp_path / "x", read)
        told(caught.value, words)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"a": 1}, {"classifier.bias": torch.ones(3)}, [1], "x"],
    ids=["empty", "numbers", "half", "list", "text"],
)
def test_a_state_dict_of_ones_own(tensors: Any, model: Any) -> None:
    config = LoraConfig(modified_modules=["query"])
    with unchanged(model), pytest.raises(OpenDeltaError):
        AutoDeltaModel.from_finetuned(None, model, delta_config=config, state_dict=tensors)


def test_a_backbone_of_another_size(folder: Path) -> None:
    """Keys fit, shapes do not: nothing is loaded."""
    import transformers

    small = transformers.BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=160, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(small)
    with unchanged(model), pytest.raises(RuntimeError) as caught:
        AutoDeltaModel.from_finetuned(folder, model, check_hash=False)
    told(caught.value, ("lora_A", "(8, 64)", "(8, 32)"))


def test_a_backbone_of_another_kind(folder: Path) -> None:
    model = backbones.build("gpt2")
    with unchanged(model), pytest.raises(OpenDeltaError, match="'query'"):
        AutoDeltaModel.from_finetuned(folder, model, check_hash=False)


def test_a_deeper_backbone(folder: Path) -> None:
    """One of its layers would stay untrained: it is refused, naming the missing keys."""
    import transformers

    config = backbones.build("bert_cls").config
    config.num_hidden_layers = 3
    model = transformers.BertForSequenceClassification(config)
    with unchanged(model), pytest.raises(RuntimeError, match=r"missing.*layer\.2\."):
        AutoDeltaModel.from_finetuned(folder, model, check_hash=False)


# --- saving ---------------------------------------------------------------------------------------


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
