"""Modules of a delta's own: copies of the backbone's, or given ones, in their places."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from opendelta.addressing.patterns import as_patterns, matches_any
from opendelta.backends import bmt
from opendelta.backends.dense import dense_weight
from opendelta.backends.quantised import compute_dtype
from opendelta.backends.sharding import is_shard
from opendelta.delta.plan import Plan, copied
from opendelta.exceptions import AddressingError, DeltaWarning, InsertionError, nearest, warn
from opendelta.ground.names import dotted
from opendelta.ground.walk import every_module
from opendelta.ground.widths import read_widths
from opendelta.mechanism.backbone_state import BackboneState, deltas
from opendelta.mechanism.child_slot import OwnModule
from opendelta.mechanism.dispatch import Dispatcher
from opendelta.mechanism.ownership import inserted_names, own_modules
from opendelta.mechanism.slot import ParameterSlot

Asked = Sequence[str] | Mapping[str, nn.Module]


def plan_own_modules(plan: Plan, asked: Asked) -> None:
    """Plan what stands in the places that patterns address, and have the config say where.

    Args:
        plan: of the delta, with all that its method puts on the backbone.
        asked: patterns, or pattern -> the module that is to stand there.

    Raises:
        AddressingError: for a pattern that addresses nothing, or the whole backbone.
        InsertionError: for a place that overlaps with another one, or with what the method
            modifies, or that holds a tied parameter; for something that is no module.
    """
    if not asked:
        return
    places = dict(own_modules(plan.backbone, originals=True))
    found: dict[str, nn.Module | None] = {}
    for pattern in as_patterns(list(asked), "own_modules"):
        names = [n for n in places if n and matches_any(tuple(_names(plan, n)), pattern)]
        given = asked[pattern] if isinstance(asked, Mapping) else None
        if not names:
            raise AddressingError(
                f"own_modules: {pattern!r} names no module inside this "
                f"{type(plan.backbone).__name__}." + nearest(pattern, [n for n in places if n])
            )
        if isinstance(asked, Mapping) and not isinstance(given, nn.Module):
            raise InsertionError(
                f"own_modules: {pattern!r} is given a {type(given).__name__}; expected the "
                "nn.Module that is to stand there."
            )
        for name in names:
            found[name] = given if given is None or len(names) == 1 else copy.deepcopy(given)
    _require_apart(plan, found)
    for name, given in found.items():
        own = bare_copy(plan.backbone, name, places[name]) if given is None else given
        if any(own is module for module in every_module(plan.backbone)):
            raise InsertionError(
                f"own_modules: the module given for {name!r} is one of the backbone: give another, "
                "or name its place alone for a copy."
            )
        for p in own.parameters():
            p.requires_grad_(p.is_floating_point())
        parent, _, leaf = name.rpartition(".")
        plan.replace(plan.backbone.get_submodule(parent), leaf, own, OwnModule)
    plan.record.config.put(own_modules=list(found))


def _names(plan: Plan, name: str) -> list[str]:
    return list(dict.fromkeys([name, *plan.targeting.names_of(name)]))


def _require_apart(plan: Plan, names: Mapping[str, object]) -> None:
    """Refuse places inside each other, around or inside what is modified, and ties."""
    hosts = {i.host_name: plan.delta for i in plan.insertions if i.host_name and not i.passes_on}
    for delta in deltas(plan.backbone):
        acting = (i for i in delta.insertions if i.of_method and not i.passes_on)
        hosts |= dict.fromkeys((i.host_name for i in acting if i.host_name), delta)
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in own_modules(plan.backbone, remove_duplicate=False, originals=True):
        for own_name, p in module._parameters.items():
            if p is not None:
                holders[id(p)].append(dotted(name, own_name))
    for name in names:
        inner = next((o for o in names if o != name and _is_inside(o, name)), None)
        if inner is not None:
            raise InsertionError(
                f"own_modules: {inner!r} is inside {name!r}, which brings it along: name one."
            )
        host = next((h for h in hosts if _is_inside(h, name) or _is_inside(name, h)), None)
        if host is not None:
            whose = "this" if hosts[host] is plan.delta else "another"
            raise InsertionError(
                f"own_modules: {name!r} overlaps with {host!r}, which {whose} "
                f"{type(hosts[host]).__name__} modifies: what acts there would act on one of "
                "the two. Leave that out with exclude_modules, or name another place."
            )
        for aliases in holders.values():
            inside = [n for n in aliases if _is_inside(n, name)]
            if inside and len(inside) < len(aliases):
                other = next(n for n in aliases if n not in inside)
                raise InsertionError(
                    f"own_modules: {inside[0]!r} is tied to {other!r}, and a copy of it would not "
                    "be. Train it in its place, freeze_module(exclude=[...]), or load the backbone "
                    "with tie_word_embeddings=False."
                )


def _is_inside(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def bare_copy(backbone: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """A copy of a module of the backbone without any delta, dense where it is quantised."""
    memo: dict[int, Any] = {}
    slots: dict[int, list[ParameterSlot]] = defaultdict(list)
    for state in BackboneState.within(backbone):
        for slot in state.slots.values():
            for place in slot.places:
                slots[id(place)].append(slot)
    parts = list(own_modules(module, originals=True))
    if any(BackboneState.of(part) is not None for _, part in parts):
        raise InsertionError(
            f"own_modules: {name!r}, or a part of it, is the backbone of a delta: remove() that."
        )
    for _, part in parts:
        for slot in slots[id(part)]:
            in_place = part._parameters.get(slot.name)
            memo[id(in_place)] = None if slot.original is None else copied(slot.original)
        for p in part._parameters.values():
            if p is not None and id(p) not in memo and _is_plain(p):
                memo[id(p)] = copied(p)
        for inserted in inserted_names(part):
            memo[id(part._modules.get(inserted))] = None
    twin = copy.deepcopy(module, memo)
    for relative, part in parts:
        for inserted in inserted_names(part):
            twin.get_submodule(relative)._modules.pop(inserted, None)
    for part in every_module(twin):
        for table in (part._forward_hooks, part._forward_pre_hooks):
            for key in [k for k, hook in table.items() if isinstance(hook, Dispatcher)]:
                del table[key]
    return _densified(module, twin, name)


def _is_plain(p: nn.Parameter) -> bool:
    return (
        is_shard(p) or bmt.is_distributed(p) or (type(p) is nn.Parameter and p.is_floating_point())
    )


def _densified(module: nn.Module, twin: nn.Module, name: str) -> nn.Module:
    """A copy in which quantised linears are dense ones."""
    packed = [
        (relative, part)
        for relative, part in own_modules(module, originals=True)
        if any(p is not None and not _is_plain(p) for p in part._parameters.values())
    ]
    for relative, part in packed:
        widths = read_widths(part)
        if widths is None or hasattr(part, "kernel_size"):
            raise InsertionError(
                f"own_modules: {dotted(name, relative)!r} ({type(part).__name__}) is stored in a "
                "form that is not a float, so it cannot be trained: name another place, or give "
                "the module that is to stand there, own_modules={...}."
            )
        dtype, bias = compute_dtype(part) or torch.get_default_dtype(), getattr(part, "bias", None)
        weight = dense_weight(part)
        dense = nn.Linear(*widths, bias=bias is not None, device=weight.device, dtype=dtype)
        with torch.no_grad():
            dense.weight.copy_(weight)
            if bias is not None:
                dense.bias.copy_(bias)
        dense.train(part.training)
        if not relative:
            twin = dense
        else:
            parent, _, leaf = relative.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, dense)
    if packed:
        warn(
            f"own_modules: {name!r} is quantised; the delta's own is a dense copy of it, in "
            f"{dtype}.",
            DeltaWarning,
        )
    return twin
