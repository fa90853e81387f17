"""Compiled backbones compute what plain ones do, attached, detached and attached again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import IMPOSSIBLE, METHODS, PAIRS, QUICK_BACKBONES, built, loss, output, put, randomise
from placed import trainable

from opendelta import LoraModel, gen_model_hash

# Compiling takes seconds a pair: in `make test` LoRA is compiled on the quick backbones, and each
# method on the smallest that it goes on.
SMALLEST = {(m, "bert" if (m, "mlp") in IMPOSSIBLE else "mlp") for m in METHODS}
QUICK = {("LoraModel", b) for b in QUICK_BACKBONES} | SMALLEST
pairs = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
few = [
    pytest.param(*pair, marks=() if pair in SMALLEST else pytest.mark.slow)
    for pair in PAIRS
    if pair in SMALLEST or pair[1] == "bert"
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("method", "backbone"), pairs)
def test_compiled_equals_eager(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    randomise(delta)
    delta.freeze_module()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with_delta = backbones.run(model, backbone)
    close(output(compiled, backbone), with_delta)
    delta.detach()
    bare = backbones.run(model, backbone)
    assert (bare - with_delta).abs().max() > 1e-3
    close(output(compiled, backbone), bare)
    delta.attach()
    close(output(compiled, backbone), with_delta)


@pytest.mark.parametrize(("method", "backbone"), few)
@pytest.mark.parametrize("inside", [False, True])
def test_a_delta_on_an_already_compiled_model_acts(
    method: str, backbone: str, inside: bool
) -> None:
    model = backbones.build(backbone)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    bare = output(compiled, backbone).detach()
    delta = put(method, backbone, compiled if inside else model)
    randomise(delta)
    eager = backbones.run(model, backbone)
    assert (eager - bare).abs().max() > 1e-3
    close(output(compiled, backbone), eager)
    delta.remove()
    close(output(compiled, backbone), bare)


@pytest.mark.parametrize(("method", "backbone"), few)
def test_detaching_costs_one_graph_and_attaching_again_none(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    randomise(delta)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    close(output(compiled, backbone), with_delta := output(model, backbone))
    at_first = graphs  # the hook of a soft prompt on the root is a graph of its own
    assert at_first > 0
    delta.detach()
    close(output(compiled, backbone), bare := output(model, backbone))
    assert graphs <= at_first + 1
    for switch, expected in ((delta.attach, with_delta), (delta.detach, bare)) * 2:
        switch()
        close(output(compiled, backbone), expected)
    assert graphs <= at_first + 1
    assert bare.shape != with_delta.shape or (bare - with_delta).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("method", "backbone"), few)
def test_inductor_computes_the_same_gradients(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    randomise(delta)
    delta.freeze_module()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    close(output(compiled, backbone), output(model, backbone))
    parameters = [p for p in delta.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss(model, backbone), parameters, allow_unused=True)
    actual = torch.autograd.grad(loss(compiled, backbone), parameters, allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 1e-6 for grad in expected)
    for ours, eager in zip(actual, expected, strict=True):
        assert (ours is None) == (eager is None)
        if ours is not None:
            torch.testing.assert_close(ours, eager, atol=1e-6, rtol=1e-4)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_what_torch_compile_returns_stands_for_the_model(tmp_path: Path) -> None:
    """Wherever a module of the backbone is asked for, the compiled one will do."""
    model = backbones.build("mlp")
    compiled = torch.compile(model, backend="eager")
    delta = LoraModel(compiled, modified_modules=["first"])
    randomise(delta)
    expected = backbones.run(model, "mlp")
    delta.freeze_module(module=compiled)
    assert trainable(model) == set(model.state_dict()) == {f"first.lora.lora_{x}" for x in "AB"}
    delta.set_active_state_dict(compiled)
    delta.save_checkpoint(tmp_path / "w.safetensors", backbone_model=compiled)
    delta.detach(module=compiled)
    assert not delta.is_attached
    delta.attach(module=compiled)
    delta.load_checkpoint(tmp_path / "w.safetensors", backbone_model=compiled)
    assert torch.equal(backbones.run(model, "mlp"), expected)
    assert gen_model_hash(compiled) == gen_model_hash(backbones.build("mlp"))
