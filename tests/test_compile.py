"""Compiled backbones compute what plain ones do, attached, detached and attached again."""

from __future__ import annotations

from collections.abc import Iterator

import backbones
import pytest
import torch
from cases import BACKBONES, METHODS, PAIRS, built, output, put, randomise

# Compiling takes seconds a pair: LoRA everywhere and each method on two backbones in `make test`.
QUICK = {("LoraModel", b) for b in BACKBONES} | {(m, b) for m in METHODS for b in ("bert", "mlp")}
pairs = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_delta_on_an_already_compiled_model_acts(method: str, inside: bool) -> None:
    model = backbones.build("bert")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    bare = output(compiled, "bert").detach()
    delta = put(method, "bert", compiled if inside else model)
    randomise(delta)
    eager = backbones.run(model, "bert")
    assert (eager - bare).abs().max() > 1e-3
    close(output(compiled, "bert"), eager)
    delta.remove()
    close(output(compiled, "bert"), bare)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
