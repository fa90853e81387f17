"""Arithmetic on deltas: a weighted sum of several as a new one."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence

import torch

from opendelta.basemodel import DeltaBase
from opendelta.delta.plan import held_back
from opendelta.delta.record import record_of
from opendelta.exceptions import ConfigError, InsertionError
from opendelta.ground.blocks import within
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.changes import Changes, one_at_a_time
from opendelta.mechanism.child_slot import OwnModule
from opendelta.mechanism.insertion import switch
from opendelta.saving.loading import take_over
from opendelta.saving.moved_buffers import moved_buffers
from opendelta.verbs.arithmetic import besides


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

    What only one of them has besides (modules of its own, parameters that its file carried) is
    copied.

    Raises:
        ConfigError: if several have such, if weights are not as many as deltas or not finite, or
            the deltas' methods, hyper-parameters or modules do not fit together.
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
    config = copy.copy(first.combined_config(deltas))
    owner = _owner(deltas)
    kept = {} if owner is None else besides(owner)
    modules = [i for d in deltas if d is owner for i in d.insertions if isinstance(i, OwnModule)]
    own = {f"[r]^{re.escape(i.place_name)}$": copy.deepcopy(i.module) for i in modules}
    with one_at_a_time(), within(torch.no_grad(), torch.random.fork_rng(devices=[])):
        values = first.combined_tensors(deltas, weights)
        with held_back() as plans:
            combined = type(first).from_config(
                config, first.backbone_model, check_hash=False, own_modules=own
            )
        changes, moved = Changes(), {} if owner is None else moved_buffers(owner)
        for plan in plans:
            plan.prepare()
        for name, tensor in combined.own_tensors():
            value = values[name] if name in values else kept.pop(name)
            tensor.data = value.detach().to(tensor.device)
        for plan in plans:
            plan.enter(changes)
        if kept:
            take_over(combined, kept, changes, is_new=True)
        switch(changes, reversed(combined.insertions), False)
        buffers = BackboneState.create(combined.backbone_model, changes).buffers
        buffers.settle(changes, off=[combined])
        buffers.load(changes, combined, moved)
        changes.carry_out()
    return combined


def _owner(deltas: Sequence[DeltaBase]) -> DeltaBase | None:
    """The only delta that has more than its method put there.

    Raises:
        ConfigError: if several have.
    """
    found = {delta: {**besides(delta), **moved_buffers(delta)} for delta in deltas}
    owners = [delta for delta in found if found[delta]]
    if len(owners) > 1:
        names = dict.fromkeys(next(iter(found[delta])) for delta in owners)
        raise ConfigError(
            f"{len(owners)} of the deltas have modules of their own, parameters that their files "
            f"carried, or buffers that they moved ({', '.join(map(repr, names))}), which do not "
            "add up: combine deltas of which one has, at most."
        )
    return owners[0] if owners else None


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
