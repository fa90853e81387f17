"""Weights of several places, which merging changes in one: untied meanwhile, or for good."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from opendelta.delta.delta import Delta
from opendelta.exceptions import InsertionError
from opendelta.ground.names import dotted
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.merged_weight import MergedHost, MergedWeight
from opendelta.mechanism.ownership import own_modules


def drop(changes: Changes, merged: dict[str, MergedHost], host: MergedHost, name: str) -> None:
    """Note a parameter no more, nor its host where it was the last."""
    left = {n: w for n, w in changes.get(host, "weights").items() if n != name}
    changes.set(host, weights=left)
    if not left:
        merged.pop(host.name, None)


def holders_of(delta: Delta, state: BackboneState) -> dict[int, list[str]]:
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


def is_tied(weight: MergedWeight, holders: dict[int, list[str]], untie: bool) -> bool:
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


def untie_rest(delta: Delta, state: BackboneState, changes: Changes) -> None:
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


def untie_for_good(tied: nn.Parameter | None, state: BackboneState, changes: Changes) -> None:
    """Let each place of what was tied keep what it has."""
    merged = changes.of(state.merged)
    for host in [*merged.values()]:
        for name, weight in changes.get(host, "weights").items():
            if weight.tied is tied:
                changes.set(weight, tied=None)
                if not host.is_folded(changes, name):
                    drop(changes, merged, host, name)
    changes.set(state, untied_configs=[])
