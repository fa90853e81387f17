"""Low-rank adapters: what the constructor's choices compute."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import weights
from cases import randomise
from torch import nn

from opendelta import LowRankAdapterModel

X = weights.uniform("x", (2, 3, 6), 1.0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_adapters_of_any_rank(rank: int) -> None:
    """0.3.2 multiplied the factors element by element, which failed above one."""
    model: Any = nn.Sequential(OrderedDict(part=nn.Linear(6, 6)))
    delta = LowRankAdapterModel(
        model,
        reduction_factor=2,
        low_rank_rank=rank,
        non_linearity="relu",
        modified_modules=["part"],
    )
    randomise(delta, 1.0)
    p = {name.removeprefix("part.low_rank_adapter."): q for name, q in delta.named_parameters()}
    y = F.linear(X, model.part.weight, model.part.bias)
    down = F.relu(y @ (p["down_sampler.W_left"] @ p["down_sampler.W_right"]) + p["down_sampler.b"])
    up = down @ (p["up_sampler.W_left"] @ p["up_sampler.W_right"]) + p["up_sampler.b"]
    assert p["down_sampler.W_left"].shape == (6, rank)
    assert torch.allclose(model(X), y + up, atol=1e-5)
