"""Constructing a delta: what is refused, in words, with the backbone exactly as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import backbones
import pytest
import torch
import transformers
from cases import METHODS, put, randomise
from placed import PLACED_METHODS, classifier, fingerprint, told, unchanged
from torch import nn

import opendelta
from opendelta import (
    AdapterConfig,
    AdapterModel,
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
from opendelta.exceptions import (
    AddressingError,
    ConfigError,
    InsertionError,
    UnknownArgumentError,
)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("method", PLACED_METHODS)
def test_what_is_new_is_in_the_mode_of_its_host(method: str, trains: bool) -> None:
    model = backbones.build("bert").train(trains)
    delta = put(method, "bert", model)
    brought = [m for i in delta.insertions for m in i.brought]
    assert all(part.training is trains for m in brought for part in m.modules())
    assert brought or method == "BitFitModel"


# --- the fingerprint itself ----------------------------------------------------------------------


Call = Callable[[Any], Any]


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
    model = classifier(carrying=False)
    before = fingerprint(model)
    assert fingerprint(model) == before
    CHANGES[change](model)
    assert fingerprint(model) != before


# --- what is refused -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("method", PLACED_METHODS)
def test_an_unknown_argument_of_any_method(method: str, model: Any) -> None:
    cls = getattr(opendelta, method)
    with unchanged(model), pytest.raises(TypeError) as caught:
        cls(model, exclude_module=["x"])
    told(caught.value, (method, "'exclude_module'", "'exclude_modules'"))


@pytest.mark.parametrize("method", PLACED_METHODS)
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
    for method in PLACED_METHODS:
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
        ("out_proj", ("attention.out_proj", "never called", "'attention'", "exclude_modules")),
    ):
        with unchanged(model), pytest.raises(OpenDeltaError) as caught:
            LoraModel(model, modified_modules=["fine", pattern])
        told(caught.value, words)
        LoraModel(model, modified_modules=["fine", pattern], exclude_modules=[pattern]).remove()


# --- weights that are read, layers without a size, compiled layers --------------------------------


class Mixer(nn.Module):
    """Reads the weight of one of its linears, as Mamba's mixer does, and calls the others."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.step, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.into(x) @ self.step.weight.t() + self.step.bias)  # type: ignore[no-any-return]


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    return transformers.MambaModel(config)


def jamba() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "mamba_dt_rank": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2}
    return transformers.JambaModel(transformers.JambaConfig(**sizes, **heads, num_hidden_layers=4))


# backbone, what it reads, that one's parent
READ: dict[str, tuple[Any, str, str]] = {
    "mamba": (mamba, "layers.0.mixer.dt_proj", "layers.0.mixer"),
    "mamba's convolution": (mamba, "layers.0.mixer.conv1d", "layers.0.mixer"),
    "jamba": (jamba, "layers.0.mamba.conv1d", "layers.0.mamba"),
    "plain": (lambda: nn.Sequential(Mixer(), nn.Linear(8, 8)), "0.step", "0"),
    "torch's attention": (
        lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}),
        "attention.out_proj",
        "attention",
    ),
}
ON_ONE = [m for m in PLACED_METHODS if m not in ("ParallelAdapterModel", "BitFitModel")]


def on_one(method: str, model: nn.Module, name: str, **more: Any) -> Any:
    small = {"reduction_factor": 2} if method in ("CompacterModel", "LowRankAdapterModel") else {}
    return getattr(opendelta, method)(model, modified_modules=[f"[r]^{name}$"], **small, **more)


@pytest.mark.parametrize("method", ON_ONE)
@pytest.mark.parametrize("kind", READ)
def test_a_weight_that_is_read_is_refused_with_what_can_be_named_instead(
    method: str, kind: str
) -> None:
    build, name, parent = READ[kind]
    model = build()
    with unchanged(model), pytest.raises(InsertionError, match="never called") as caught:
        on_one(method, model, name)
    try:
        on_one(method, build(), parent)
    except OpenDeltaError:  # of a plain network an adapter cannot tell how wide a module is
        offered = "Leave it out with exclude_modules"
    else:
        offered = f"Name {parent!r} instead"
    told(caught.value, (repr(name), offered))
    assert method != "LoraModel" or (offered.startswith("Name") == (kind != "torch's attention"))


def test_a_linear_that_is_read_and_called_is_taken() -> None:
    """As in attentions of one's own, whose parameters are called as torch's are."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.ones(24, 8))
            self.out_proj = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = (x @ self.in_proj_weight.t())[..., :8].to(self.out_proj.weight.dtype)
            return self.out_proj(x)  # type: ignore[no-any-return]

    model = nn.Sequential(Attention())
    delta = LoraModel(model, modified_modules=["0.out_proj"])
    nn.init.ones_(delta.insertions[0].module.lora_B)
    assert not torch.equal(model(torch.ones(1, 8)), Attention()(torch.ones(1, 8)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["0", "1"])
def test_layers_without_a_size_are_refused(method: str, place: str) -> None:
    """Wherever in the backbone they are: freezing and saving need them all."""
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(InsertionError, match=r"'0' is a LazyLinear.*call the model once"):
        getattr(opendelta, method)(model, modified_modules=[place])
    assert not opendelta.deltas(model) and not model[1]._forward_hooks
    model(torch.ones(2, 3))
    if method in ON_ONE:
        on_one(method, model, place).freeze_module()
        model(torch.ones(2, 3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x))
        return out


SCRIPTED = {
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, torch.ones(2, 8)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("compiling", SCRIPTED)
@pytest.mark.parametrize("method", METHODS)
def test_modules_of_torchscript_are_refused(method: str, compiling: str) -> None:
    scripted = SCRIPTED[compiling](Block())
    with pytest.raises(InsertionError, match=r"compiled by TorchScript.*torch\.jit\.trace"):
        getattr(opendelta, method)(scripted)
    if method not in PLACED_METHODS:
        return
    model = nn.Sequential(scripted, nn.Linear(8, 8))
    for names in (["0"], ["0.first"]):
        names *= 1 + (method == "ParallelAdapterModel")
        with pytest.raises(InsertionError, match=r"compiled by TorchScript.*exclude_modules"):
            getattr(opendelta, method)(model, modified_modules=names)
    assert not opendelta.deltas(model) and not model._forward_hooks
    if method in (*ON_ONE, "BitFitModel"):  # beside them all is as ever
        delta = on_one(method, model, "1")
        delta.freeze_module()
        model(torch.ones(2, 8))
        assert not any(p.requires_grad for p in scripted.parameters())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("method", ON_ONE)
def test_an_embedding_bag_is_no_embedding(method: str, mode: str) -> None:
    """Low-rank terms and scales are refused; what acts on the output does so on a bag's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 8, mode=mode), nn.Linear(8, 8))
    ids = torch.randint(0, 20, (8, 8))  # as many rows as the bags have ids: sums would broadcast
    bare = model[0](ids)
    try:
        delta = on_one(method, model, "0")
    except InsertionError as error:
        told(error, ("'0'", "EmbeddingBag"))
        assert method in ("LoraModel", "DoraModel", "IA3Model")
        return
    randomise(delta)
    (insertion,) = delta.insertions
    assert torch.equal(model[0](ids), insertion.module(bare))


@pytest.mark.parametrize(
    ("method", "argument", "here"),
    [
        (LoraModel, "r", "lora_r"),
        (LoraModel, "target_modules", "modified_modules"),
        (opendelta.PrefixModel, "num_virtual_tokens", "prefix_token_num"),
        (opendelta.SoftPromptModel, "num_virtual_tokens", "soft_token_num"),
        (opendelta.AdapterModel, "modules_to_save", "own_modules"),
    ],
)
def test_names_of_other_libraries_are_answered_by_those_used_here(
    method: Any, argument: str, here: str
) -> None:
    with pytest.raises(UnknownArgumentError, match=f"{argument!r}. Here it is called {here!r}"):
        method(backbones.build("bert"), **{argument: 8})


# --- values of the wrong kind --------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank_pattern": {"query": "8"}},
        {"rank_pattern": {"query": 2.5}},
        {"rank_pattern": {"query": True}},
        {"rank_pattern": {"query": 0}},
        {"rank_pattern": {1: 2}},
        {"rank_pattern": ["query"]},
        {"alpha_pattern": {"query": float("nan")}},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"modified_modules": []},
        {"modified_modules": ()},
        {"modified_modules": [3]},
    ],
    ids=str,
)
def test_bad_values_name_the_argument(arguments: dict[str, Any]) -> None:
    """A value of the wrong kind is refused before the backbone is touched."""
    model = backbones.build("bert")
    arguments = {"modified_modules": ["query"], **arguments}
    (name,) = {k for k in arguments if k != "modified_modules"} or {"modified_modules"}
    word = {"rank_pattern": "rank_pattern|lora_r", "alpha_pattern": "lora_alpha"}.get(name, name)
    with unchanged(model), pytest.raises((ConfigError, AddressingError), match=word):
        LoraModel(model, **arguments)
