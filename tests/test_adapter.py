"""Adapters: what the constructor's choices compute."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import weights
from cases import randomise
from torch import nn

from opendelta import AdapterModel

X = weights.uniform("x", (2, 3, 6), 1.0)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("relu", F.relu),
        ("tanh", torch.tanh),
        ("swish", F.silu),
        ("gelu_new", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_orig", F.gelu),
        ("leakyrelu", F.leaky_relu),
        ("gelu", F.gelu),
        ("silu", F.silu),
        ("GELU", F.gelu),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("mish", F.mish),
    ],
)
def test_activations(name: str, reference: Any) -> None:
    model: Any = nn.Sequential(OrderedDict(part=nn.Identity(), end=nn.Linear(6, 1)))
    model.dummy_inputs = (X,)
    delta = AdapterModel(model, 3, name, modified_modules=["part"])
    randomise(delta, 1.0)
    layer = model.part.adapter.modulelist
    hidden = reference(F.linear(X, layer.down_proj.weight, layer.down_proj.bias))
    expected = X + F.linear(hidden, layer.up_proj.weight, layer.up_proj.bias)
    assert torch.allclose(model.part(X), expected, atol=1e-5)
