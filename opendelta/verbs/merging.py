"""Merging: a delta folded into the backbone's own weights, and taken out of them again.

A method that can be merged says what the parameters of its hosts become (`Delta.folds`);
`opendelta.verbs.merge_checks` tries on an example that this is right, for every method.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch

from opendelta.delta.delta import Delta
from opendelta.delta.switching import acting, is_merged, take_off
from opendelta.exceptions import InsertionError
from opendelta.ground.names import dotted
from opendelta.ground.seams import forget_compiled_code
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.insertion import Insertion
from opendelta.mechanism.merged_weight import Fold, MergedHost, MergedWeight, is_plain
from opendelta.verbs.merge_checks import (
    Check,
    require_mergeable,
    require_neutral,
    require_uncovered,
)
from opendelta.verbs.ties import drop, holders_of, is_tied, untie_for_good, untie_rest


@torch.no_grad()
def merge(delta: Delta, safe: bool = False, untie: bool = False) -> None:
    """Fold a delta into the backbone's weights, see `DeltaBase.merge`."""
    with acting(delta, None) as (state, changes):
        require_mergeable(delta)
        _fold_in(delta, state, changes, safe, untie)


@torch.no_grad()
def unmerge(delta: Delta) -> None:
    """Take a delta out of the backbone's weights, see `DeltaBase.unmerge`."""
    with acting(delta, merged=True) as (state, changes):
        require_neutral(delta, state)
        _fold_out(delta, state, changes)


@torch.no_grad()
def remove(delta: Delta) -> None:
    """Take a delta off for good, unmerging it first, see `DeltaBase.remove`."""
    with acting(delta, None) as (state, changes):
        if is_merged(delta):
            _fold_out(delta, state, changes)
        take_off(delta, changes)


@torch.no_grad()
def merge_and_remove(delta: Delta, safe: bool = False, untie: bool = False) -> Any:
    """Leave a delta's effect in the weights for good, see `DeltaBase.merge_and_remove`."""
    with acting(delta, None) as (state, changes):
        if not is_merged(delta):
            require_mergeable(delta)
            _fold_in(delta, state, changes, safe, untie)
        _keep(delta, state, changes)
        for insertion in delta.insertions:
            insertion.keep(changes)
        state.buffers.keep(changes, delta)
        take_off(delta, changes)
    return delta.backbone_model


def _fold_in(delta: Delta, state: BackboneState, changes: Changes, safe: bool, untie: bool) -> None:
    state.require_values(delta.backbone_model)
    merged = changes.of(state.merged)
    holders = holders_of(delta, state)
    order = {id(other): number for number, other in enumerate(state.deltas)}
    on: dict[str, list[Insertion]] = defaultdict(list)
    for insertion in delta.insertions:
        if insertion.folds:
            on[insertion.host_name].append(insertion)
    require_neutral(delta, state)
    folded = {id(i) for i in delta.insertions}
    folded |= {id(fold.insertion) for host in state.merged.values() for fold in host.folds}
    unties = False
    for host_name, insertions in on.items():
        host = state.merged.get(host_name) or MergedHost(insertions[0].host, host_name)
        new = [Fold(delta, insertion) for insertion in insertions]
        folds = sorted(
            [*host.folds, *new], key=lambda fold: (fold.insertion.fold_rank, order[id(fold.delta)])
        )
        candidates = host.weights_here(state.slots)

        try:
            named, values = host.computed(folds, candidates, Check(delta, state, candidates))
        except (RuntimeError, TypeError) as error:
            for name, p in host.module._parameters.items():
                if p is not None and not is_plain(p):
                    MergedWeight(host.module, name, dotted(host_name, name), None)  # it refuses
            raise InsertionError(
                f"{type(delta).__name__} cannot be folded into {host_name!r} "
                f"({type(host.module).__name__}): {error}. Nothing was merged."
            ) from error
        for insertion in [i for i in state.insertions if id(i) not in folded]:
            for fold in named:
                require_uncovered(fold, insertion)
        for name, value in values.items():
            if safe and not bool(value.isfinite().all()):
                raise InsertionError(
                    f"{dotted(host_name, name)} would not be finite with this delta in it: look "
                    "for NaN or huge values among the delta's parameters there. Nothing was merged "
                    "(safe=True)."
                )
            if name not in host.weights and is_tied(candidates[name], holders, untie):
                candidates[name].untie(changes)
                unties = True
        changes.set(host, weights={name: candidates[name] for name in values})
        host.put(changes, named, values)
        merged[host_name] = host
    for insertion in reversed(delta.insertions):
        insertion.step_aside(changes)
    if unties:
        untie_rest(delta, state, changes)
    changes.set(state, held=None)
    state.settle_hooks(changes, delta.backbone_model)
    changes.do_first(forget_compiled_code)


def _fold_out(delta: Delta, state: BackboneState, changes: Changes) -> None:
    merged = changes.of(state.merged)
    for host in state.merged.values():
        left = [fold for fold in host.folds if fold.delta is not delta]
        if len(left) < len(host.folds):
            host.put(changes, *host.computed(left, host.weights))
    every = [(host, name, w) for host in state.merged.values() for name, w in host.weights.items()]
    apart = {id(w.tied) for host, name, w in every if host.is_folded(changes, name)} - {id(None)}
    for host, name, weight in every:
        if host.is_folded(changes, name) or id(weight.tied) in apart:
            continue
        if weight.tied is not None:
            changes.of(host.module._parameters)[name] = weight.tied
        drop(changes, merged, host, name)
    if all(
        w.tied is None for host in merged.values() for w in changes.get(host, "weights").values()
    ):
        for config in state.untied_configs:
            changes.set(config, tie_word_embeddings=True)
        changes.set(state, untied_configs=[])
    everything = [*state.insertions]
    for insertion in delta.insertions:
        insertion.step_back(changes, everything[everything.index(insertion) + 1 :])
    state.settle_hooks(changes, delta.backbone_model)
    changes.do_first(forget_compiled_code)


def _keep(delta: Delta, state: BackboneState, changes: Changes) -> None:
    """Let the weights be their own originals with this delta in them."""
    merged = changes.of(state.merged)
    for host in [*merged.values()]:
        folds, weights = changes.get(host, "folds"), changes.get(host, "weights")
        mine = [fold for fold in folds if fold.delta is delta]
        if not mine:
            continue
        for name in [name for fold in mine for name in fold.names]:
            if weights[name].tied is not None:
                untie_for_good(weights[name].tied, state, changes)
        kept = MergedHost(host.module, host.name)
        kept.folds = [fold for fold in folds if fold.delta is not delta]
        if not kept.folds:
            del merged[host.name]
            continue
        for name, value in host.computed(mine, weights)[1].items():
            kept.weights[name] = weight = copy.copy(weights[name])
            weight.original, weight.tied = value, None
        kept.put(changes, *kept.computed(kept.folds, kept.weights))
        merged[host.name] = kept
