"""`DeltaBase` as the specification lays it down (1.20.2): signatures, and what a delta is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomise
from pieces import forward_hooks, linears

from opendelta import (
    AdapterModel,
    BitFitModel,
    CompacterModel,
    DeltaBase,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
)

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
