"""A backward that computes a part of the model again finds the deltas as its forward had them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import backbones
import pytest
import torch
from cases import IMPOSSIBLE, METHODS, REENTRANT, built, loss, put, randomise
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import BitFitModel, DeltaBase, LoraModel
from opendelta.exceptions import InsertionError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")

CHECKPOINTED = ("bert", "t5", "llama")
pairs = [(m, b) for m in METHODS for b in CHECKPOINTED if (m, b) not in IMPOSSIBLE]
everywhere = [
    pytest.param(*pair, marks=() if pair[1] == "llama" else pytest.mark.slow) for pair in pairs
]


def training(method: str, backbone: str, reentrant: bool | None) -> tuple[Any, DeltaBase]:
    model, delta = built(method, backbone)
    randomise(delta)
    delta.freeze_module()
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model, delta


def gradients(delta: DeltaBase) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in delta.named_parameters() if p.grad is not None}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-6, rtol=1e-5)


# --- transformers' checkpointing ------------------------------------------------------------------


@pytest.mark.parametrize(("method", "backbone"), everywhere)
def test_a_reference_without_gradients_between_forward_and_backward(
    method: str, backbone: str
) -> None:
    """As in DPO."""
    found = []
    for reentrant in (None, *REENTRANT):
        model, delta = training(method, backbone, reentrant)
        policy = loss(model, backbone)
        with torch.no_grad(), delta.detached():
            reference = loss(model, backbone)
        (policy - reference).square().backward()
        found.append(gradients(delta))
    for actual in found[1:]:
        close(actual, found[0])


@pytest.mark.parametrize(("method", "backbone"), everywhere)
@pytest.mark.parametrize("reentrant", REENTRANT)
def test_a_delta_that_is_attached_for_the_forward_alone(
    method: str, backbone: str, reentrant: bool
) -> None:
    """Refused, or, where what is computed again does not depend on it, right."""
    model, delta = training(method, backbone, reentrant)
    delta.detach()
    with delta.attached():
        policy = loss(model, backbone)
    if method != "SoftPromptModel":
        with pytest.raises(InsertionError, match="was attached in the forward and is detached"):
            policy.backward()
        delta.zero_grad()
        with delta.attached():
            loss(model, backbone).backward()
    else:
        policy.backward()
    plain, expected = training(method, backbone, None)
    loss(plain, backbone).backward()
    close(gradients(delta), gradients(expected))


# --- torch's own ----------------------------------------------------------------------------------


class Net(nn.Module):
    """A network that checkpoints a block of its own, or all of itself from outside."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).requires_grad_()
        if self.reentrant is None:
            return self.last(self.block(x))
        return self.last(checkpoint(self.block, x, use_reentrant=self.reentrant))


def net(
    method: Any, reentrant: bool | None, hosts: tuple[str, ...] = ("block.0",)
) -> tuple[Net, DeltaBase]:
    torch.manual_seed(0)
    model = Net(reentrant).train()
    delta = method(model, modified_modules=[*hosts])
    randomise(delta)
    delta.freeze_module()
    return model, delta


X = torch.linspace(-1, 1, 60).view(10, 6)


def _detach(model: Net, delta: DeltaBase) -> None:
    delta.detach()


def _merge(model: Net, delta: DeltaBase) -> None:
    delta.merge()


def _remove(model: Net, delta: DeltaBase) -> None:
    delta.remove()


def _keep(model: Net, delta: DeltaBase) -> None:
    delta.merge_and_remove()


def _another(model: Net, delta: DeltaBase) -> None:
    opendelta.AdapterModel(model, modified_modules=["block.2"], bottleneck_dim=2)


BETWEEN: dict[str, tuple[Callable[[Net, DeltaBase], None], str]] = {
    "detached": (_detach, "attached in the forward and is detached"),
    "merged": (_merge, "attached in the forward and is merged"),
    "removed": (_remove, "attached in the forward and is detached"),
    "kept": (_keep, "attached in the forward and is detached"),
    "another constructed": (_another, "'block.2.adapter' was detached in the forward and is att"),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("method", [LoraModel, BitFitModel])
@pytest.mark.parametrize("reentrant", [True, False])
def test_whatever_changes_what_a_block_computes(reentrant: bool, method: Any, between: str) -> None:
    act, message = BETWEEN[between]
    model, delta = net(method, reentrant)
    output = model(X).square().mean()
    act(model, delta)
    with pytest.raises(InsertionError, match=message):
        output.backward()
    assert not torch_module._global_forward_pre_hooks


@pytest.mark.parametrize("method", [LoraModel, BitFitModel])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_delta_that_was_detached_and_is_attached(reentrant: bool, method: Any) -> None:
    model, delta = net(method, reentrant)
    model.requires_grad_(True)
    delta.detach()
    weight = model.block[2].weight
    model(X).square().mean().backward()
    assert weight.grad is not None
    expected = weight.grad.clone()
    output = model(X).square().mean()
    with delta.attached(), pytest.raises(InsertionError, match="was detached in the forward"):
        output.backward()
    model.zero_grad()
    model(X).square().mean().backward()
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("method", [LoraModel, BitFitModel])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_model_that_is_checkpointed(reentrant: bool, method: Any) -> None:
    model, delta = net(method, None)
    x = X.clone().requires_grad_()
    model(x).square().mean().backward()
    expected = gradients(delta)
    delta.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    close(gradients(delta), expected)
    output = checkpoint(model, x, use_reentrant=reentrant).square().mean()
    delta.detach()
    with pytest.raises(InsertionError, match="attached in the forward and is detached"):
        output.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_route_that_has_ended(reentrant: bool) -> None:
    model, delta = net(LoraModel, reentrant)
    other = LoraModel(model, modified_modules=["block.2"])
    rows = [delta, other] * 5
    with opendelta.route(model, rows):
        output = model(X).square().mean()
    with pytest.raises(InsertionError, match="another route"):
        output.backward()
    with opendelta.route(model, rows):
        output = model(X).square().mean()
    with opendelta.route(model, [other, delta] * 5), pytest.raises(InsertionError, match="route"):
        output.backward()
    with opendelta.route(model, rows):
        output = model(X).square().mean()
    with opendelta.route(model, rows):  # the same again
        output.backward()


# --- no false alarm -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoraModel, BitFitModel])
def test_a_forward_that_keeps_its_values_has_its_backward_whenever(method: Any) -> None:
    model, delta = net(method, None)
    model(X).square().mean().backward()
    expected = gradients(delta)
    delta.zero_grad()
    output = model(X).square().mean()
    delta.detach()
    output.backward()
    close(gradients(delta), expected)
    assert not torch_module._global_forward_pre_hooks


@pytest.mark.parametrize("method", [LoraModel, BitFitModel])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_no_delta_is_in_may_be_computed_again(reentrant: bool, method: Any) -> None:
    found = []
    for kind in (None, reentrant):
        model, delta = net(method, kind, ("first", "last"))
        output = model(X).square().mean()
        delta.detach()
        output.backward()
        found.append(gradients(delta))
    close(found[1], found[0])


@pytest.mark.parametrize("method", [LoraModel, BitFitModel])
@pytest.mark.parametrize("reentrant", [True, False])
def test_forwards_whose_graphs_are_dropped(reentrant: bool, method: Any) -> None:
    """They ask for nothing, and nothing of them stays."""
    model, delta = net(method, reentrant)
    model(X).square().mean().backward()
    expected = gradients(delta)
    delta.zero_grad()
    dropped = []
    for number in range(100):
        x = X.clone()
        if number % 2:
            delta.detach()
        model.requires_grad_(True)
        dropped.append(weakref.ref(x))
        model(x)
        delta.attach()
    del x
    gc.collect()
    assert not any(ref() is not None for ref in dropped)
    delta.zero_grad()
    model(X).square().mean().backward()
    close({n: g for n, g in gradients(delta).items() if n in expected}, expected)


def test_a_backward_that_broke_off_leaves_nothing_behind() -> None:
    model, delta = net(LoraModel, None)
    entering = X.clone().requires_grad_()

    def fail(grad: Tensor) -> Tensor:
        raise ZeroDivisionError

    entering.register_hook(fail)
    output = model(entering).sum()
    delta.detach()
    with pytest.raises(ZeroDivisionError):
        output.backward()
    model(X)
    assert not torch_module._global_forward_pre_hooks


def test_a_copy_compares_with_its_own() -> None:
    """A copied backbone is told by its own deltas, not by those it was copied with."""
    model, delta = net(LoraModel, False)
    model(X)
    twin = copy.deepcopy(model)
    (theirs,) = opendelta.deltas(twin)
    delta.detach()
    twin(X).sum().backward()
    output = twin(X).sum()
    theirs.detach()
    with pytest.raises(InsertionError, match="attached in the forward"):
        output.backward()


def test_several_forwards_with_one_delta_each() -> None:
    """Two policies on one backbone, switched between their forwards, wait for one backward."""
    model, a = net(LoraModel, False)
    b = LoraModel(model, modified_modules=["block.2"])
    randomise(b)
    b.detach()
    first = model(X).sum()
    with a.detached(), b.attached():
        second = model(X).sum()
    with pytest.raises(InsertionError, match="'block.(0|2).lora' was"):
        (first + second).backward()


@pytest.mark.parametrize("method", ["LoraModel", "BitFitModel"])
def test_on_a_backbone_of_vision(method: str) -> None:
    model = backbones.build("vit")
    delta = put(method, "vit", model)
    randomise(delta)
    delta.freeze_module()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    output = loss(model, "vit")
    delta.detach()
    with pytest.raises(InsertionError, match="attached in the forward and is detached"):
        output.backward()
