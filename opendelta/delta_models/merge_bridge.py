"""From `folds` to the one weight that merging asks for today; goes when merging asks `folds`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.exceptions import InsertionError
from opendelta.ground.containers import map_hidden
from opendelta.ground.widths import example_inputs


def twin_of(host: nn.Module, values: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A layer like `host` whose parameters are plain ones of another dtype, some replaced."""
    twin = copy.copy(host)
    twin._parameters = {
        name: p if p is None else nn.Parameter(values.get(name, p).detach().to(dtype))
        for name, p in host._parameters.items()
    }
    return twin


def merged_by_folds(delta: Any, insertion: Any, weight: Tensor) -> Tensor:
    """The host's weight with an insertion in it, if the host then computes what that added.

    Raises:
        InsertionError: if it does not.
    """
    made = copy.copy(insertion)
    made.host = twin_of(insertion.host, {"weight": weight}, weight.dtype)
    folded: Tensor = delta.folds(made)["weight"].detach()
    if folded.isfinite().all() and not _agrees(delta, insertion, made.host):
        raise InsertionError(
            f"{insertion.host_name!r} ({type(insertion.host).__name__}) does more to its input "
            "than its kind of layer does, so that a changed weight would not do what the low-rank "
            "term does. It can be detached and saved, but not merged. Nothing was merged."
        )
    return folded


def _agrees(delta: Any, insertion: Any, host: nn.Module) -> bool:
    x = example_inputs(host)
    if x is None:
        return False
    made, wide = copy.copy(insertion), torch.float64
    made.host, made.module = twin_of(host, {}, wide), copy.deepcopy(insertion.module).to(wide)
    made.module.eval()
    x = x.to(wide) if x.is_floating_point() else x
    try:
        before = type(host).forward(made.host, x)
        expected = insertion.action(made.module, made.host, (x,), {}, before)
        after = type(host).forward(twin_of(made.host, delta.folds(made), wide), x)
        added = map_hidden(expected, lambda hidden: hidden - before)
        change = map_hidden(after, lambda hidden: hidden - before)
    except Exception:  # a host that takes other inputs, whatever it says of this one
        return False
    return torch.allclose(change, added, rtol=1e-3, atol=1e-4 * float(added.abs().max()))
