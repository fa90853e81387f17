"""Arithmetic on deltas: a weighted sum of several as a new one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opendelta.exceptions import ConfigError, InsertionError

if TYPE_CHECKING:
    from opendelta.basemodel import DeltaBase


def combine(deltas: Sequence[DeltaBase], weights: Sequence[float]) -> DeltaBase:
    """A new delta on the same backbone that is a weighted sum of others.

    What is summed is, by method:

    - LoRA: the effects, exactly. The factors are concatenated, so that ranks add up; deltas may
      have different ranks and modules. Dropout is the first delta's.
    - BitFit: the differences to the backbone's own biases.
    - any other method: the parameters. The effect of such a sum is no sum of effects, since these
      methods are not linear in their parameters. Hyper-parameters and modules must be equal.

    Args:
        deltas: deltas of one method on one backbone, attached, detached or merged.
        weights: a finite number for each; negative ones subtract.

    Returns:
        The new delta, detached: nothing changes until its ``attach()``. The others stay as they
        are.

    Raises:
        ConfigError: if weights are not as many as deltas or not finite, or the deltas' methods,
            hyper-parameters or modules do not fit together.
        InsertionError: if the deltas are on different backbones, or one was removed.

    Example:
        >>> opendelta.combine([style, toxic], weights=[1.0, -0.3]).attach()
    """
    if not isinstance(deltas, (list, tuple)) or not isinstance(weights, (list, tuple)):
        raise ConfigError(
            "combine takes a list of deltas and a list of their weights: "
            "combine([one, other], weights=[0.5, 0.5])."
        )
    deltas, weights = list(deltas), [float(weight) for weight in weights]
    _check(deltas, weights)
    first = deltas[0]
    config = first.combined_config(deltas)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        values = first.combined_tensors(deltas, weights)
        combined = type(first).from_config(config, first.backbone_model, check_hash=False)
        try:
            for insertion in reversed(combined.insertions):
                insertion.detach()
            for name, tensor in combined.own_tensors():
                tensor.data = values[name].to(tensor.device)
        except BaseException:
            combined.remove()
            raise
    return combined


def _check(deltas: list[DeltaBase], weights: list[float]) -> None:
    if not deltas or len(deltas) != len(weights):
        raise ConfigError(
            f"{len(deltas)} deltas and {len(weights)} weights: combine takes one weight for each "
            "of one or more deltas."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights={weights}; expected finite numbers.")
    first = deltas[0]
    for delta in deltas:
        delta.require_presence()
        if type(delta) is not type(first):
            raise ConfigError(
                f"{' and '.join(sorted(type(d).__name__ for d in (first, delta)))} cannot be "
                "combined: attach both instead, they act together."
            )
        if delta.backbone_model is not first.backbone_model:
            raise InsertionError(
                "The deltas are on different backbones. Save one and load it onto the other's "
                "backbone, then combine the two."
            )


def require_equal_hyperparameters(deltas: Sequence[DeltaBase]) -> None:
    """Refuse deltas whose method was set differently.

    Raises:
        ConfigError: naming the field and its values.
    """
    for name in deltas[0].config.method_fields:
        values = [getattr(delta.config, name, None) for delta in deltas]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"{name} differs ({', '.join(map(repr, values))}): the parameters of "
                f"{type(deltas[0]).__name__} add up only if its hyper-parameters are equal."
            )


def weighted_sums(deltas: Sequence[DeltaBase], weights: Sequence[float]) -> dict[str, Tensor]:
    """Name in a saved file -> weighted sum of the deltas' tensors of that name.

    Sums are computed in float32 or wider. Tensors that never train are not summed.

    Raises:
        ConfigError: if the deltas' tensors do not have the same names and shapes, or one that
            never trains is not the same in all.
    """
    tensors = [{n: t.detach() for n, t in delta.own_tensors()} for delta in deltas]
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in tensors]
    for other in shapes:
        unlike = sorted(name for name, _ in other.items() ^ shapes[0].items())
        if unlike:
            raise ConfigError(
                "The deltas do not sit on the same modules, or not with the same shapes: they "
                f"differ in {unlike[0]}{f' and {len(unlike) - 1} more' * (len(unlike) > 1)}."
            )
    constant = {tensor.data_ptr() for tensor in deltas[0].constants()}
    sums = {}
    for name, tensor in tensors[0].items():
        terms = [each[name].to(tensor.device) for each in tensors]
        if tensor.data_ptr() in constant or not tensor.is_floating_point():
            if not all(torch.equal(term, tensor) for term in terms):
                raise ConfigError(f"{name} never trains and must be the same in all deltas.")
            sums[name] = tensor.clone()
        else:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            total = sum(w * term.to(wide) for w, term in zip(weights, terms, strict=True))
            assert isinstance(total, Tensor)
            sums[name] = total.to(tensor.dtype)
    return sums
