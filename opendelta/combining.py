"""Arithmetic on deltas: a weighted sum of several as a new one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opendelta.basemodel import DeltaBase
from opendelta.delta.plan import held_back
from opendelta.delta.record import record_of
from opendelta.exceptions import ConfigError, InsertionError
from opendelta.ground.blocks import within
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.changes import Changes, one_at_a_time
from opendelta.mechanism.insertion import switch
from opendelta.saving.moved_buffers import moved_buffers


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
    with one_at_a_time(), within(torch.no_grad(), torch.random.fork_rng(devices=[])):
        values = first.combined_tensors(deltas, weights)
        with held_back() as plans:
            combined = type(first).from_config(config, first.backbone_model, check_hash=False)
        changes, moved = Changes(), _moved(deltas)
        for plan in plans:
            plan.prepare()
        for name, tensor in combined.own_tensors():
            tensor.data = values[name].to(tensor.device)
        for plan in plans:
            plan.enter(changes)
        switch(changes, reversed(combined.insertions), False)
        buffers = BackboneState.create(combined.backbone_model, changes).buffers
        buffers.settle(changes, off=[combined])
        buffers.load(changes, combined, moved)
        changes.carry_out()
    return combined


def _moved(deltas: list[DeltaBase]) -> dict[str, Tensor]:
    """The persistent buffers that deltas moved, which only one of them may have."""
    found = [moved for delta in deltas if (moved := moved_buffers(delta))]
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} of these deltas moved buffers of the backbone in training, such as "
            f"{next(iter(found[0]))!r}: statistics have no weighted sum. Only one delta of a sum "
            "may have moved any."
        )
    return found[0] if found else {}


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
        if record_of(delta).removed:
            raise InsertionError(f"This {type(delta).__name__} was removed from its backbone.")
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
