"""How a delta gets on a module and runs there: sides, arguments, outputs, names, seats."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import backbones
import pytest
import torch
import weights
from cases import METHODS, randomise
from pieces import replicate
from placed import unchanged
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import opendelta
from opendelta import (
    AdapterModel,
    BaseDeltaConfig,
    CompacterModel,
    DeltaBase,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
)
from opendelta.exceptions import InsertionError

# --- building blocks of methods ------------------------------------------------------------------


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


# --- the specification's walk --------------------------------------------------------------------


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


# --- what a module is called with ----------------------------------------------------------------


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 100


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, mask: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        y: Tensor = self.inner(hidden)
        return y if mask is None else y * mask


class Calls(nn.Module):
    """Calls `Masked` in one of several ways."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.part = Masked()

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.part, x)


@pytest.mark.parametrize(
    "call",
    [
        lambda part, x: part(mask=torch.ones(1, dtype=torch.long), hidden=x),
        lambda part, x: part(hidden=x, mask=torch.ones(1, dtype=torch.long)),
        lambda part, x: part(None, x),
        lambda part, x: part(None, hidden=x),
    ],
)
def test_before_changes_the_argument_that_it_read(call: Callable[..., Tensor]) -> None:
    """The hidden state is written back where it was found among the arguments."""
    model = Calls(call)
    x = torch.randn(2, 4)
    expected = model(x + 100)
    DeltaBase(model).insert_module(model.part, "before", Shift(), "shift")
    assert torch.equal(model(x), expected)


def test_a_module_that_is_called_with_ids_by_keyword() -> None:
    """An adapter behind the embeddings needs no float among the arguments."""
    model = backbones.build("bert")
    bare = backbones.run(model, "bert")
    randomise(AdapterModel(model, modified_modules=["embeddings"]))
    assert not torch.equal(backbones.run(model, "bert"), bare)


# --- containers of every kind --------------------------------------------------------------------


HIDDEN = weights.uniform("x", (2, 3, 6), 1.0)


class Pair(NamedTuple):
    hidden: Tensor
    other: str


class Returning(nn.Module):
    """Gives its input doubled, in a container of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = 2 * x
        made: dict[str, Any] = {
            "tensor": y,
            "tuple": (y, "other", None),
            "list": [y, "other"],
            "namedtuple": Pair(y, "other"),
            "dict": {"ids": torch.tensor([1]), "hidden": y, "other": "other"},
            "model output": BaseModelOutput(last_hidden_state=y, hidden_states=(x,)),
        }
        self.made = made[self.kind]
        return self.made


def hidden_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return next(v for v in output.values() if isinstance(v, Tensor) and v.is_floating_point())
    first: Tensor = output[0]
    return first


KINDS = ["tensor", "tuple", "list", "namedtuple", "dict", "model output"]


LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adapter": (AdapterModel, {"bottleneck_dim": 2}),
    "low_rank_adapter": (LowRankAdapterModel, {"reduction_factor": 2}),
    "compactor": (CompacterModel, {"reduction_factor": 3, "hypercomplex_division": 2}),
    "parallel_adapter": (ParallelAdapterModel, {"bottleneck_dim": 2}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_of_every_kind(name: str, kind: str) -> None:
    cls, arguments = LAYERS[name]
    model: Any = nn.Sequential(OrderedDict(part=Returning(kind)))
    model.dummy_inputs = {"input": HIDDEN}
    part = ["part"] * (2 if name == "parallel_adapter" else 1)
    delta = cls(model, modified_modules=part, **arguments)
    randomise(delta)
    layer = model.part._modules[name]
    output = model(HIDDEN)
    expected = 2 * HIDDEN + layer(HIDDEN) if name == "parallel_adapter" else layer(2 * HIDDEN)
    assert torch.allclose(hidden_of(output), expected, atol=1e-6)
    assert not torch.allclose(hidden_of(output), 2 * HIDDEN)
    made = model.part.made
    assert type(output) is type(made)
    if kind != "tensor":
        assert torch.equal(hidden_of(made), 2 * HIDDEN)  # the module's own container is not changed
        assert len(output) == len(made)
    if kind in ("tuple", "list", "namedtuple"):
        assert output[1] == "other"
    if kind == "dict":
        assert list(output) == ["ids", "hidden", "other"] and output["other"] == "other"
    if kind == "model output":
        assert output.last_hidden_state is output[0] and torch.equal(
            output.hidden_states[0], HIDDEN
        )


@pytest.mark.parametrize("given", ["text", None, 3, (), {"a": "text"}])
def test_an_output_without_hidden_state_is_refused_at_construction(given: Any) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return given

    model: Any = nn.Sequential(OrderedDict(part=Odd(), end=nn.Identity()))
    model.dummy_inputs = (HIDDEN,)
    with unchanged(model), pytest.raises(InsertionError):
        AdapterModel(model, modified_modules=["part"])


# --- what a module returns -----------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoraModel, AdapterModel])
def test_hidden_states_are_those_with_the_delta(method: Callable[..., DeltaBase]) -> None:
    """``output_hidden_states`` shows the same whether or not it was asked for before."""
    seen = []
    for ran_before in (True, False):
        model = backbones.build("bert")
        inputs = backbones.inputs("bert")
        with torch.no_grad():
            if ran_before:
                model(**inputs, output_hidden_states=True)
            randomise(method(model, modified_modules=["[r]encoder\\.layer\\.\\d+$"]))
            seen.append(model(**inputs, output_hidden_states=True))
    for one, other in zip(seen[0].hidden_states, seen[1].hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(seen[0].hidden_states[-1], seen[0].last_hidden_state)


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 4
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[Any, Any]:
        return {0: self.inner(x), ("a", 1): "kept"}


def test_outputs_whose_keys_are_no_strings() -> None:
    """A dict comes back as a dict with the same keys, its hidden state changed."""
    model = nn.Sequential(Keyed())
    x = torch.randn(2, 4)
    bare = model(x)
    delta = AdapterModel(model, modified_modules=["0"])
    randomise(delta)
    after = model(x)
    assert list(after) == [0, ("a", 1)]
    assert after["a", 1] == "kept"
    assert not torch.equal(after[0], bare[0])


# --- modules that run their children -------------------------------------------------------------


class Chain(nn.Module):
    """A chain inside a model: `nn.Sequential` runs whatever is registered on it."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.dummy_inputs = {"x": torch.zeros(1, 8)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain(x)


@pytest.mark.parametrize(
    "method",
    [opendelta.AdapterModel, opendelta.LowRankAdapterModel, opendelta.ParallelAdapterModel],
)
def test_a_delta_on_a_chain_acts_once(method: type[DeltaBase], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chain().eval()
    x = torch.randn(3, 8)
    bare = model(x)
    parallel = method is opendelta.ParallelAdapterModel
    options = {"modified_modules": ["chain"] * (2 if parallel else 1)}
    delta = method(model, **options)
    for p in delta.parameters():
        nn.init.normal_(p, std=0.5)
    seat = list(model.chain._modules)[-1]
    layer = delta.get_submodule(f"chain.{seat}")
    expected = bare + layer(x) if parallel else layer(bare)
    assert torch.allclose(model(x), expected)
    name = next(name for name, _ in model.named_parameters() if "down" in name)
    assert name.startswith(f"chain.{seat}.") and name in model.state_dict()
    assert type(layer).__name__ in str(model) and type(layer).__name__ in str(
        opendelta.Visualization(model).structure_graph(printTree=False)
    )

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(twin(x), expected)
        (theirs,) = opendelta.deltas(twin)
        for p in theirs.parameters():
            nn.init.zeros_(p)
        assert torch.allclose(twin(x), bare) and torch.allclose(model(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), expected)
    model.train()
    assert layer.training and not model.eval().chain[2].training and not layer.training
    model.double()
    assert next(layer.parameters()).dtype == torch.float64
    model.float()

    delta.freeze_module()
    model(x).sum().backward()
    assert all(p.grad is not None for p in delta.parameters())
    delta.save_finetuned(tmp_path)
    torch.manual_seed(0)
    other = Chain().eval()
    opendelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=other)
    assert torch.equal(other(x), model(x))
    delta.detach()
    assert torch.equal(model(x), bare) and len(model.chain) == 2
    delta.attach()
    assert torch.allclose(model(x), expected)
    delta.remove()
    assert torch.equal(model(x), bare) and len(model.chain) == 2


class Runner(nn.Module):
    """A module of a user's own that goes through its children."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_a_delta_beside_what_a_module_runs_acts_once_on_replicas_too(own: bool) -> None:
    torch.manual_seed(0)
    model, x = Chain().eval(), torch.randn(3, 8)
    if own:
        model.chain = Runner().eval()
    bare = model(x)
    delta = opendelta.AdapterModel(model, modified_modules=["chain"])
    randomise(delta)
    expected = delta.get_submodule("chain.adapter")(bare)
    assert not torch.equal(expected, bare)
    assert torch.equal(model(x), expected)
    replica = replicate(model)
    for p in delta.parameters():
        p.zero_()
    assert torch.equal(model(x), bare) and torch.equal(replica(x), expected)


# --- nested tensors -------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Torch's own encoder, which in evaluation makes nested tensors of a padded batch."""

    def __init__(self, layers: int, activation: str, norm: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, activation, batch_first=True)
        self.embed = nn.Embedding(50, 16)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(16) if norm else None)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=ids == 0)[:, 0])


ENCODERS = {
    "two layers": (2, "relu", False),
    "a norm": (1, "relu", True),
    "gelu": (3, "gelu", True),
}
ON_ENCODERS: dict[str, list[list[str]]] = {
    "LoraModel": [["linear1", "linear2"]],
    "DoraModel": [["linear1", "linear2"]],
    "IA3Model": [["linear1", "linear2"]],
    "AdapterModel": [["linear1"], ["linear2", "norm2"], ["[r]layers.[0-9]"]],
    "CompacterModel": [["linear1"], ["linear2", "norm2"], ["[r]layers.[0-9]"]],
    "LowRankAdapterModel": [["linear1"], ["linear2", "norm2"], ["[r]layers.[0-9]"]],
    "ParallelAdapterModel": [["linear1", "linear2"]],
    "BitFitModel": [["linear1"], ["self_attn", "norm1"]],
}
on_encoders = [(method, names) for method, all_names in ON_ENCODERS.items() for names in all_names]


def test_every_method_is_tried_on_nested_tensors() -> None:
    """But those that torch's attention and embeddings by hand cannot have, which say so."""
    assert set(METHODS) - set(ON_ENCODERS) == {"PrefixModel", "SoftPromptModel"}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("method", "names"), on_encoders)
def test_nested_tensors(method: str, names: list[str], kind: str) -> None:
    """Evaluation under no_grad takes torch's fast path, and gives what other forwards give."""
    torch.manual_seed(0)
    model = Encoder(*ENCODERS[kind]).eval()
    ids = torch.randint(1, 50, (5, 9))
    ids[1, 5:] = ids[3, 2:] = 0
    with torch.no_grad():
        bare = model(ids)
    more = {"reduction_factor": 4} if method == "CompacterModel" else {}
    delta = getattr(opendelta, method)(model, modified_modules=names, **more)
    randomise(delta)
    seen: list[bool] = []
    model.encoder.layers[0].linear1.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_nested)
    )
    slow = model(ids)
    with torch.no_grad():
        fast = model(ids)
    assert seen == [False, True]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    assert (slow - bare).abs().max() > 1e-3
    delta.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), bare, atol=1e-5, rtol=1e-4)


def test_a_route_with_nested_tensors_says_how_to_have_none() -> None:
    model = Encoder(2, "relu", False).eval()
    delta = LoraModel(model, modified_modules=["linear1"])
    ids = torch.randint(1, 50, (2, 5))
    ids[1, 3:] = 0
    rows = [delta, None]
    error = pytest.raises(InsertionError, match="enable_nested_tensor=False")
    with opendelta.route(model, rows), torch.no_grad(), error:
        model(ids)
    with opendelta.route(model, rows):
        model(ids)  # gradients are on: there are none
