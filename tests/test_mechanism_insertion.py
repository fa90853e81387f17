"""How a delta gets on a module and runs there: sides, arguments, outputs, names, seats."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import randomise
from pieces import replicate
from torch import Tensor, nn

import opendelta
from opendelta import AdapterModel, DeltaBase, LoraModel

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
    layer = delta.insertions[0].module
    expected = bare + layer(x) if parallel else layer(bare)
    assert torch.allclose(model(x), expected)
    name = next(name for name, _ in model.named_parameters() if "down" in name)
    assert name.startswith("chain." + delta.insertions[0].name) and name in model.state_dict()
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
    expected = delta.insertions[0].module(bare)
    assert not torch.equal(expected, bare)
    assert torch.equal(model(x), expected)
    replica = replicate(model)
    for p in delta.parameters():
        p.zero_()
    assert torch.equal(model(x), bare) and torch.equal(replica(x), expected)
