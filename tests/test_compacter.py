"""Compacter: every flag against the Kronecker products written out."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import weights
from torch import Tensor, nn

from opendelta import CompacterModel

FLAGS: list[dict[str, Any]] = [
    {},
    {"learn_phm": False},
    {"shared_phm_rule": True},
    {"factorized_phm": False},
    {"shared_W_phm": True},
    {"factorized_phm_rule": True},
    {"kronecker_prod": True},
    {"use_bias_up_sampler": False},
    {"use_bias_down_sampler": False},
    {"shared_phm_rule": True, "factorized_phm_rule": True},
    {"shared_W_phm": True, "factorized_phm": False},
    {"factorized_phm": False, "phm_rank": 2},
    {"phm_rank": 2},
    {"hypercomplex_nonlinearity": "normal", "phm_init_range": 0.1},
    {"phm_c_init": "uniform"},
]


def kronecker(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """x @ sum_i kron(rule_i, W_i) + b with torch.kron."""
    rule = p["phm_rule"] if "phm_rule" in p else p["phm_rule_left"] @ p["phm_rule_right"]
    weight = p["W"] if "W" in p else p["W_left"] @ p["W_right"]
    whole = sum(
        torch.kron(r.contiguous(), w.contiguous()) for r, w in zip(rule, weight, strict=True)
    )
    return x @ whole + p.get("b", torch.zeros(()))  # type: ignore[operator]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags) or "default")
def test_every_flag_of_compacter_computes_and_trains(flags: dict[str, Any]) -> None:
    model: Any = nn.Sequential(OrderedDict(a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    delta = CompacterModel(
        model, modified_modules=["a", "b"], reduction_factor=2, non_linearity="tanh", **flags
    )
    with torch.no_grad():
        for name, p in delta.named_parameters():
            p.copy_(weights.uniform(name, p.shape, 1.0))
    x = weights.uniform("c", (5, 8), 1.0)
    expected = x
    for part in (model.a, model.b):
        expected = F.linear(expected, part.weight, part.bias)
        named = dict(part.compactor.named_parameters(remove_duplicate=False))
        down, up = (
            {n.split(".")[1]: p for n, p in named.items() if n.startswith(side)}
            for side in ("down", "up")
        )
        expected = expected + kronecker(up, torch.tanh(kronecker(down, expected)))
    assert torch.allclose(model(x), expected, atol=1e-4)

    delta.freeze_module()
    model(x).square().sum().backward()
    for name, p in delta.named_parameters():
        constant = flags.get("learn_phm") is False and "phm_rule" in name
        assert p.requires_grad is not constant
        assert (p.grad is None) if constant else (p.grad is not None and bool(p.grad.any())), name
    rules = {id(m.phm_rule) for m in model.modules() if hasattr(m, "phm_rule")}
    if flags == {"shared_phm_rule": True}:
        assert len(rules) == 1
    if flags == {}:
        assert len(rules) == 4
    if flags == {"shared_W_phm": True}:
        assert model.a.compactor.up_sampler.W_left is model.b.compactor.up_sampler.W_left
