"""Widths that stand nowhere: one forward finds them, and leaves all as it was."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import backbones
import pytest
import torch
import weights
from placed import place, unchanged
from torch import Tensor, nn

from opendelta import (
    AdapterModel,
    BitFitModel,
    CompacterModel,
    DeltaWarning,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
)
from opendelta.exceptions import InsertionError

X = weights.uniform("x", (2, 3, 6), 1.0)


class Inner(nn.Module):
    """A module whose width is nowhere written."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    """Takes what `check` lets through; has dropout, batch statistics and a counter."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 5)
        self.part = Inner()
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.dimensions = dimensions
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        if ids.dim() != self.dimensions:
            raise ValueError(f"expected {self.dimensions} dimensions")
        self.calls += 1
        self.seen.append((self.training, torch.is_grad_enabled()))
        x = self.dropout(self.part(self.embedding(ids)))
        y: Tensor = self.norm(x.reshape(-1, 5)) * scale * torch.rand(())
        return y


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_the_automatic_pseudo_input(dimensions: int, training: bool) -> None:
    """tensor([[0, 0, 0]]), else tensor([0, 0, 0]); the model is as if it had not run."""
    model = Net(dimensions).train(training)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    random_state = torch.get_rng_state()
    modes = {name: m.training for name, m in model.named_modules()}
    delta = LowRankAdapterModel(
        model, modified_modules=["part"], reduction_factor=1, low_rank_w_init="normal"
    )
    assert next(p for n, p in delta.named_parameters() if n.endswith("W_left")).shape == (5, 1)
    assert model.seen == [(False, False)]
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    expected = torch.Generator()
    expected.set_state(random_state)
    for _, p in delta.named_parameters():  # the draws of the new layers alone
        if p.dim() > 1:
            torch.empty(p.shape).normal_(std=0.01, generator=expected)
    assert torch.equal(torch.get_rng_state(), expected.get_state())


@pytest.mark.parametrize(
    "own",
    [
        {"ids": torch.tensor([[[1, 2]]]), "scale": 2.0},
        (torch.tensor([[[1, 2]]]),),
        [torch.tensor([[[1, 2]]]), 3.0],
        torch.tensor([[[1, 2]]]),
    ],
    ids=["dict", "tuple", "list", "tensor"],
)
def test_a_pseudo_input_of_ones_own(own: Any) -> None:
    model: Any = Net(3)
    with unchanged(model), pytest.raises(InsertionError, match="dummy_inputs"):
        AdapterModel(model, modified_modules=["part"])
    model.dummy_inputs = own
    AdapterModel(model, modified_modules=["part"], bottleneck_dim=2)
    assert model.part.adapter.modulelist.down_proj.weight.shape == (2, 5)


def test_the_models_own_error_is_told() -> None:
    """0.3.2 swallowed it and left the delta without parameters."""
    model: Any = Net(3)
    with unchanged(model), pytest.raises(InsertionError, match="expected 3 dimensions") as caught:
        AdapterModel(model, modified_modules=["part"])
    assert isinstance(caught.value.__cause__, ValueError)
    model.dummy_inputs = {"ids": torch.tensor([0])}
    with unchanged(model), pytest.raises(InsertionError, match="expected 3 dimensions"):
        AdapterModel(model, modified_modules=["part"])


def test_the_pseudo_input_follows_the_models_dtype() -> None:
    model: Any = nn.Sequential(OrderedDict(part=Inner())).to(torch.bfloat16)
    model.dummy_inputs = (torch.zeros(1, 5),)
    delta = AdapterModel(model, modified_modules=["part"])
    assert {p.dtype for p in delta.parameters()} == {torch.bfloat16}


def test_no_pseudo_input_is_needed_where_sizes_are_written() -> None:
    """LoRA and BitFit never run the model, and adapters on linears need not."""

    class Untouchable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(6, 4)

        def forward(self) -> None:
            raise AssertionError("the model ran")

    for cls in (LoraModel, BitFitModel, AdapterModel, LowRankAdapterModel, CompacterModel):
        cls(Untouchable(), modified_modules=["part"])
    ParallelAdapterModel(Untouchable(), modified_modules=["part", "part"])


def test_pixels_and_wrapped_models() -> None:
    """A transformers model states the form of its input; one inside a wrapper does so too."""
    model: Any = backbones.build("vit")
    AdapterModel(model, modified_modules=["[r]layers\\.\\d+"])
    assert model.layers[0].adapter.modulelist.down_proj.in_features == 64
    wrapped: Any = backbones.build("bert_wrapped")
    AdapterModel(wrapped, modified_modules=["attention"])
    layer = wrapped.net.bert.encoder.layer[1].attention
    assert layer.adapter.modulelist.up_proj.out_features == 64


def test_a_module_that_is_never_called_is_refused() -> None:
    model = backbones.build("bert")
    with unchanged(model), pytest.raises(InsertionError, match="'encoder.layer'"):
        AdapterModel(model, modified_modules=["encoder.layer"])


def test_the_pseudo_forward_is_no_first_forward() -> None:
    """It may take another way than the user's inputs, and tells nothing about earlier deltas."""

    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Inner(6), nn.Linear(6, 6)

        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            y: Tensor = self.a(x)
            return self.b(y) if both else y

    for both in (True, False):
        model: Any = Ways().eval()
        model.dummy_inputs = (X,)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LoraModel(model, modified_modules=["b"])
            AdapterModel(model, modified_modules=["a"])
            if both:
                model(X, both=True)
                continue
        with pytest.warns(DeltaWarning, match=r"b\.lora"):
            model(X)


def test_one_forward_serves_all_modules() -> None:
    model: Any = backbones.build("bert")
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    place("AdapterModel", "bert_cls", model, modified_modules=["attention", "encoder.layer.0"])
    handle.remove()
    assert len(runs) == 1
