"""Merging: a delta folded into the backbone's own weights, and taken out of them again.

A method that can be merged says what the parameters of its hosts become (`Delta.folds`); that this
is right is tried here on an example, for every method.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.delta.delta import Delta
from opendelta.delta.registry import every_method
from opendelta.delta.switching import acting, is_merged, take_off
from opendelta.exceptions import InsertionError
from opendelta.ground.containers import hidden_of
from opendelta.ground.examples import example_input
from opendelta.ground.names import dotted
from opendelta.ground.seams import forget_compiled_code
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.insertion import Insertion
from opendelta.mechanism.merged_weight import Fold, MergedHost, MergedWeight, is_plain
from opendelta.mechanism.ownership import own_modules

_SMALL = 1 << 22  # hosts of up to so many values are tried in float64


@torch.no_grad()
def merge(delta: Delta, safe: bool = False, untie: bool = False) -> None:
    """Fold a delta into the backbone's weights, see `DeltaBase.merge`."""
    with acting(delta, None) as (state, changes):
        _require_mergeable(delta)
        _fold_in(delta, state, changes, safe, untie)


@torch.no_grad()
def unmerge(delta: Delta) -> None:
    """Take a delta out of the backbone's weights, see `DeltaBase.unmerge`."""
    with acting(delta, merged=True) as (state, changes):
        _require_neutral(delta, state)
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
            _require_mergeable(delta)
            _fold_in(delta, state, changes, safe, untie)
        _keep(delta, state, changes)
        take_off(delta, changes)
    return delta.backbone_model


# --- what may be merged ---------------------------------------------------------------------------


def _can_be_merged(method: type[Delta]) -> bool:
    return method.folds is not Delta.folds or method.merges_into is not None


def _require_mergeable(delta: Delta) -> None:
    name = type(delta).__name__
    if not _can_be_merged(type(delta)):
        raise InsertionError(
            f"{name} cannot be merged: what it computes is no change of the backbone's weights. "
            f"{', '.join(m.__name__ for m in every_method().values() if _can_be_merged(m))} can be."
        )
    if is_merged(delta):
        raise InsertionError(
            f"This {name} is merged into its backbone's weights: unmerge() it first."
        )
    if not all(i.attached for i in delta.insertions if i.content is not None):
        raise InsertionError(
            f"This {name} is not attached, or only in part: attach() it, then merge."
        )


def _require_same(fold: Fold, host: nn.Module, made: dict[str, Tensor]) -> None:
    """Refuse a fold after which the host does not compute what it does with the delta.

    Args:
        fold: what is folded in.
        host: the twin of its host before it; `made`: its parameters after it.

    Raises:
        InsertionError: if it computes something else, or that cannot be told.
    """
    if not all(bool(value.isfinite().all()) for value in made.values()):
        return  # which shows nothing, and is the business of `safe`
    insertion = fold.insertion
    if insertion.module is None and all(
        name == insertion.name and torch.equal(value.to(insertion.content), insertion.content)
        for name, value in made.items()
    ):
        return  # the very parameter that acts
    reason = "would not compute what the delta does"
    small = sum(p.numel() for p in host._parameters.values() if p is not None) < _SMALL
    dtype = torch.float64 if small else torch.float32
    before = _in_dtype(host, host._parameters, dtype)
    after = _in_dtype(host, {**host._parameters, **made}, dtype)
    x = None if getattr(host, "max_norm", None) is not None else example_input(before, dtype)
    if x is not None and insertion.module is not None:
        try:
            bare = hidden_of(type(host).forward(before, x))
            expected = hidden_of(insertion.output_on(before, x, dtype))
            folded = hidden_of(type(host).forward(after, x))
        except Exception as error:  # a host that takes other inputs, whatever it says of this one
            reason = f"cannot be tried on an example ({type(error).__name__}: {error!s:.80})"
        else:
            added = (expected - bare).abs().max()
            slack = 1e-3 * added + (1e-10 if small else 1e-5) * bare.abs().max()
            if bool((folded - expected).abs().max() <= slack):
                return
    raise InsertionError(
        f"{insertion.host_name!r} ({type(insertion.host).__name__}) {reason} with the parameters "
        f"{', '.join(made)} that {type(fold.delta).__name__}.folds gives: either the layer does "
        "more to its input than its kind does, or the method folds wrongly. The delta can be "
        "detached and saved, but not merged. Nothing was merged."
    )


class _Check:
    """What is asked of each fold of a host while `delta` is folded in."""

    def __init__(
        self, delta: Delta, state: BackboneState, candidates: Mapping[str, MergedWeight]
    ) -> None:
        self.delta, self.state, self.candidates = delta, state, candidates

    def __call__(self, fold: Fold, twin: nn.Module, made: dict[str, Tensor]) -> None:
        for name in made.keys() - self.candidates.keys():
            full_name = dotted(fold.insertion.host_name, name)
            MergedWeight(twin, name, full_name, self.state.slots.get(full_name))  # it refuses
        if fold.delta is self.delta:
            _require_same(fold, twin, made)


def _in_dtype(host: nn.Module, parameters: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A twin of a host with parameters and buffers of a dtype, where they are floats."""
    twin = copy.copy(host)

    def cast_(tensor: Any) -> Any:
        return tensor if tensor is None or not tensor.is_floating_point() else tensor.to(dtype)

    twin._parameters = {
        name: None if p is None else nn.Parameter(cast_(p.detach()), requires_grad=False)
        for name, p in parameters.items()
    }
    twin._buffers = {name: cast_(buffer) for name, buffer in host._buffers.items()}
    return twin


def _require_neutral(delta: Delta, state: BackboneState) -> None:
    """Refuse to fold a delta in, or out, where it or another one then acts otherwise than before.

    Whether others are attached does not matter, for they may be attached later.

    Raises:
        InsertionError: naming what acts and what is merged.
    """
    order = {id(insertion): number for number, insertion in enumerate(state.insertions)}
    folds = [fold for host in state.merged.values() for fold in host.folds]
    folded = [fold.insertion for fold in folds if fold.delta is not delta]
    mine = [insertion for insertion in delta.insertions if insertion.content is not None]
    apart = {id(insertion) for insertion in (*folded, *mine)}
    others = [insertion for insertion in state.insertions if id(insertion) not in apart]
    for around, merged, reads in ((others, mine, True), (mine, folded, False)):
        on: dict[int, list[Insertion]] = defaultdict(list)
        for insertion in merged:
            on[id(insertion.host)].append(insertion)
        for acts, other in ((a, m) for a in around for m in on[id(a.host)]):
            differs = acts.differs_beside(other, order[id(acts)] < order[id(other)])
            if differs or (reads and acts.reads_host and other.module is not None):
                raise _not_beside(acts, other)
    for fold in folds:
        for insertion in mine if fold.delta is not delta else ():
            _require_uncovered(fold, insertion)


def _require_uncovered(fold: Fold, acts: Insertion) -> None:
    """Refuse where what acts stands in the place of a parameter that another fold changes."""
    apart = acts.slot is None or fold.insertion.slot is acts.slot
    if not apart and acts.name in fold.names and fold.insertion.host in acts.places:
        raise _not_beside(acts, fold.insertion)


def _not_beside(acts: Insertion, merged: Insertion) -> InsertionError:
    return InsertionError(
        f"{dotted(acts.host_name, acts.name)} does not act beside a merged {merged.name!r} as it "
        "does where that acts by itself. Merge what acts nearer to the module (a parameter, "
        "then what was put on earlier) first and unmerge it last; where that is refused too, "
        "remove() one of them, or construct them in the other order. Nothing was changed."
    )


# --- in, out, for good ----------------------------------------------------------------------------


def _fold_in(delta: Delta, state: BackboneState, changes: Changes, safe: bool, untie: bool) -> None:
    merged = changes.of(state.merged)
    holders = _holders(delta, state)
    order = {id(other): number for number, other in enumerate(state.deltas)}
    on: dict[str, list[Insertion]] = defaultdict(list)
    for insertion in delta.insertions:
        if insertion.content is not None:
            on[insertion.host_name].append(insertion)
    _require_neutral(delta, state)
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
            named, values = host.computed(folds, candidates, _Check(delta, state, candidates))
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
                _require_uncovered(fold, insertion)
        for name, value in values.items():
            if safe and not bool(value.isfinite().all()):
                raise InsertionError(
                    f"{dotted(host_name, name)} would not be finite with this delta in it: look "
                    "for NaN or huge values among the delta's parameters there. Nothing was merged "
                    "(safe=True)."
                )
            if name not in host.weights and _is_tied(candidates[name], holders, untie):
                candidates[name].untie(changes)
                unties = True
        changes.set(host, weights={name: candidates[name] for name in values})
        host.put(changes, named, values)
        merged[host_name] = host
    for insertion in reversed(delta.insertions):
        insertion.step_aside(changes)
    if unties:
        _untie_rest(delta, state, changes)
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
        _drop(changes, merged, host, name)
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
        _, values = host.computed(mine, weights)
        for name in [name for fold in mine for name in fold.names]:
            if weights[name].tied is not None:
                _untie_for_good(weights[name].tied, state, changes)
        kept = MergedHost(host.module, host.name)
        kept.folds = [fold for fold in folds if fold.delta is not delta]
        if not kept.folds:
            del merged[host.name]
            continue
        for name, value in values.items():
            kept.weights[name] = weight = copy.copy(weights[name])
            weight.original, weight.tied = value, None
        kept.put(changes, *kept.computed(kept.folds, kept.weights))
        merged[host.name] = kept


def _drop(changes: Changes, merged: dict[str, MergedHost], host: MergedHost, name: str) -> None:
    """Note a parameter no more, nor its host where it was the last."""
    left = {n: w for n, w in changes.get(host, "weights").items() if n != name}
    changes.set(host, weights=left)
    if not left:
        merged.pop(host.name, None)


# --- ties -----------------------------------------------------------------------------------------


def _holders(delta: Delta, state: BackboneState) -> dict[int, list[str]]:
    """Id of a parameter -> its names in the backbone, one per module that holds it."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in own_modules(delta.backbone_model):
        for own_name, p in module._parameters.items():
            holders[id(p)].append(dotted(name, own_name))
    for host in state.merged.values():  # what is tied again when that one is unmerged
        for weight in host.weights.values():
            if weight.tied is not None:
                holders[id(weight.tied)].append(weight.full_name)
    return holders


def _is_tied(weight: MergedWeight, holders: dict[int, list[str]], untie: bool) -> bool:
    """Whether merging has to untie a weight; places that a slot fills change together."""
    others = [name for name in holders[id(weight.parameter)] if name != weight.full_name]
    if not others or weight.slot is not None:
        return False
    if not untie:
        raise InsertionError(
            f"{weight.full_name} is tied to {', '.join(others)}, which merging would change "
            "too. merge(untie=True) gives each a copy of its own and sets "
            "tie_word_embeddings=False in the config; the model then needs memory, and room "
            "on disk, for all of them. Nothing was merged."
        )
    return True


def _untie_rest(delta: Delta, state: BackboneState, changes: Changes) -> None:
    """Untie whatever is still tied to untied weights: the config unties all, when loaded."""
    merged = changes.of(state.merged)
    every = [w for host in merged.values() for w in changes.get(host, "weights").values()]
    tied = {id(weight.tied) for weight in every} - {id(None)}
    kept: set[int] = set()  # the first place of each keeps it
    for name, module in own_modules(delta.backbone_model):
        for own_name, p in changes.of(module._parameters).items():
            if id(p) in kept:
                host = merged.setdefault(name, MergedHost(module, name))
                weight = MergedWeight(module, own_name, dotted(name, own_name), None)
                weight.untie(changes)
                changes.set(host, weights={**changes.get(host, "weights"), own_name: weight})
            elif id(p) in tied:
                kept.add(id(p))
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            changes.set(config, tie_word_embeddings=False)
            known = changes.get(state, "untied_configs")
            if not any(config is other for other in known):
                changes.set(state, untied_configs=[*known, config])


def _untie_for_good(tied: nn.Parameter | None, state: BackboneState, changes: Changes) -> None:
    """Let each place of what was tied keep what it has."""
    merged = changes.of(state.merged)
    for host in [*merged.values()]:
        for name, weight in changes.get(host, "weights").items():
            if weight.tied is tied:
                changes.set(weight, tied=None)
                if not host.is_folded(changes, name):
                    _drop(changes, merged, host, name)
    changes.set(state, untied_configs=[])
