"""What trains: freezing a backbone around its deltas (specification 1.20.2, `freeze_module`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from opendelta.addressing.patterns import as_patterns, matches_any
from opendelta.addressing.targeting import Targeting
from opendelta.delta.delta import Delta
from opendelta.delta.record import record_of
from opendelta.delta.switching import acting, is_merged
from opendelta.exceptions import (
    AddressingError,
    ConfigError,
    DeltaWarning,
    UnmatchedPatternWarning,
    nearest,
    warn,
)
from opendelta.ground.names import dotted, lineage
from opendelta.ground.walk import uncompiled
from opendelta.mechanism.backbone_state import (
    BackboneState,
    SubmoduleTrim,
    own_parameters,
)
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.hooks import add_state_dict_hooks
from opendelta.mechanism.hosts import require_hosts
from opendelta.mechanism.ownership import own_modules
from opendelta.mechanism.state_dict import WholePart, models_inside

logger = logging.getLogger(__name__)

EVERY_DELTA = "deltas"


class Selection:
    """Which names a list of patterns reaches, a module's pattern reaching all inside it.

    Args:
        patterns: strings in the syntax of name-based addressing.
        names_of: all names of a module: its own and, under common structure, the common ones.
    """

    def __init__(self, patterns: Sequence[str], names_of: Callable[[str], Iterable[str]]) -> None:
        self.unmatched = set(patterns)
        self._patterns, self._names_of = patterns, names_of
        self._known: dict[str, bool] = {"": False}

    def __contains__(self, name: str) -> bool:
        if not self._patterns:
            return False
        known = self._known.get(name)
        if known is None:
            parent = name.rpartition(".")[0]
            names = tuple(self._names_of(name))
            hits = [p for p in self._patterns if matches_any(names, p)]
            self.unmatched.difference_update(hits)
            known = self._known[name] = (parent in self) or bool(hits)
        return known


def freeze(
    delta: Delta,
    module: nn.Module | None = None,
    exclude: Sequence[str | Delta] | str | Delta | None = None,
    set_state_dict: bool | None = True,
    prefix: str = "",
) -> None:
    """Freeze a backbone around its deltas, see `Delta.freeze_module`."""
    if module is not None and not isinstance(module, nn.Module):
        raise ConfigError(
            f"freeze_module: the first argument, module={module!r:.80}, is a part of the "
            "backbone; what stays trainable is named by exclude=[...]."
        )
    record = record_of(delta)
    with acting(delta, None) as (state, changes):
        backbone, targeting = delta.backbone_model, record.targeting
        own = [] if is_merged(delta) else delta.insertions
        require_hosts(backbone, [i for i in state.insertions if i.attached or i in own], changes)
        module = backbone if module is None else uncompiled(module)
        state.buffers.note(changes, backbone)
        for found in (state, *BackboneState.within(backbone)):  # before what trains changes
            found.buffers.settle(changes, starts=not state.was_trainable)
        part = prefix or ("" if module is backbone else targeting.name_of(module))
        asked: Any = exclude if exclude is not None else (delta.unfrozen_modules or [EVERY_DELTA])
        asked = asked if isinstance(asked, (list, tuple)) else [asked]
        declared = _frozen(
            delta,
            changes,
            state,
            backbone,
            part,
            asked,
            names_of=targeting.names_of,
            inside_deltas=exclude is not None,
            warn_unmatched=exclude is not None or not record.from_file,
        )
        under = part + "." if part else ""
        known = record.left_trainable or ()
        elsewhere = [name for name in known if part and not name.startswith(under)]
        changes.set(record, left_trainable=[*elsewhere, *declared])
        if exclude is not None and module is backbone:  # what the delta's file says from now on
            kept = [item if isinstance(item, str) else EVERY_DELTA for item in asked]
            changes.of(record.base)["unfrozen_modules"] = kept = list(dict.fromkeys(kept))
            changes.set(record.config, unfrozen_modules=kept or [EVERY_DELTA])
        if set_state_dict:
            _trim(changes, state, backbone, module, targeting)


def trim_state_dict(delta: Delta, module: nn.Module) -> None:
    """Reduce ``module.state_dict()``, see `Delta.set_active_state_dict`."""
    with acting(delta, None) as (state, changes):
        _trim(changes, state, delta.backbone_model, module, record_of(delta).targeting)


def _trim(
    changes: Changes,
    state: BackboneState,
    backbone: nn.Module,
    module: nn.Module,
    targeting: Targeting,
) -> None:
    module = uncompiled(module)
    if module is backbone:
        changes.set(state, trimmed=True, held=None)
        for part in models_inside(backbone):
            if not any(type(hook) is WholePart for hook in part._state_dict_hooks.values()):
                whole = WholePart(state)
                made = add_state_dict_hooks(changes, part, whole, whole.accept)
                changes.set(state, handles=[*changes.get(state, "handles"), *made])
        return
    targeting.name_of(module)  # raises for a module of another model
    if not any(type(hook) is SubmoduleTrim for hook in module._state_dict_hooks.values()):
        trim = SubmoduleTrim(state)
        made = add_state_dict_hooks(changes, module, trim, trim.accept)
        changes.set(state, handles=[*changes.get(state, "handles"), *made])


def _frozen(
    delta: Delta,
    changes: Changes,
    state: BackboneState,
    backbone: nn.Module,
    part: str,
    exclude: Sequence[str | Delta],
    *,
    names_of: Callable[[str], Iterable[str]],
    inside_deltas: bool,
    warn_unmatched: bool,
) -> list[str]:
    """Prepare to freeze all parameters under `part` but those that `exclude` names.

    Args:
        delta: for which this is done.
        changes: what the flags come in with.
        state: the backbone's state; `backbone`: its root.
        part: name of the submodule to freeze, ``""`` for the whole backbone.
        exclude: patterns, ``"deltas"`` for every delta, or delta objects.
        names_of: see `Selection`.
        inside_deltas: whether patterns may name what sits inside a delta (``"lora_A"``).
        warn_unmatched: whether a pattern that reaches nothing warns.

    Returns:
        Names of the backbone's own parameters that `exclude` left trainable, one per tie.

    Raises:
        AddressingError: if `exclude` holds anything else.
    """
    modules = list(own_modules(backbone, remove_duplicate=False))
    states = [(name, found) for name, m in modules if (found := BackboneState.of(m)) is not None]
    present = [(name, delta) for name, found in states for delta in found.deltas]
    for _, other in present:
        other.look_at_places()
    kept_deltas = [item for item in exclude if not isinstance(item, str)]
    strangers = [item for item in kept_deltas if not any(item is other for _, other in present)]
    if strangers:
        (item, *_) = strangers
        said = "one" if isinstance(item, nn.Module) else f"{item!r:.80}"  # modules print long
        raise AddressingError(
            f"exclude holds {said} of type {type(item).__name__}; expected patterns, 'deltas', or "
            "delta objects of this backbone."
        )
    if EVERY_DELTA in exclude:
        kept_deltas = [other for _, other in present]
    texts = as_patterns([item for item in exclude if isinstance(item, str)], "exclude")
    patterns = [pattern for pattern in texts if pattern != EVERY_DELTA]
    selection = Selection(patterns, names_of)
    under = part + "." if part else ""

    own_names = {name for name, _ in modules}
    of_deltas: set[int] = set()
    trains = False
    flags: dict[nn.Parameter, bool] = {}
    for root, other in present:
        kept = any(other is item for item in kept_deltas)
        for insertion in other.insertions:
            constant = {id(tensor) for tensor in insertion.constants()}
            for name, p in insertion.named_parameters():
                name = dotted(root, name)
                of_deltas.add(id(p))
                if not name.startswith(under) or not p.is_floating_point():
                    trains = trains or p.requires_grad
                    continue
                # A pattern for the backbone takes along the deltas inside what it names.
                by_name = inside_deltas or insertion.is_named_as_own
                reached = bool(patterns) and (
                    (name if by_name else _host(name, own_names)) in selection
                )
                carried = not insertion.of_method and other is delta and not inside_deltas
                if reached and not insertion.of_method and other is not delta:
                    if insertion.attached and inside_deltas:
                        raise AddressingError(
                            f"exclude names {name!r}, in whose place stands that of another "
                            f"{type(other).__name__}: freeze_module of that delta trains it; "
                            "detach() it to train the backbone's own."
                        )
                    reached = False
                flag = (kept or reached or carried) and id(p) not in constant
                flags[p] = flag
                trains = trains or flag
            own = insertion.named_parameters()
            trained_names = (name for name, p in own if flags.get(p, p.requires_grad))
            changes.set(insertion, trained=frozenset(trained_names))
    deltas_train = trains

    named: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    set_aside = [  # what a delta's parameter set aside is frozen like the rest
        (dotted(root, name), slot.original)
        for root, found in states
        for name, slot in found.slots.items()
        if slot.original is not None and slot.top is not None
    ]
    set_aside += [
        (dotted(root, dotted(name, own_name)), p)
        for root, found in states
        for name, slot in found.child_slots.items()
        if slot.top is not None
        for own_name, p in slot.original.named_parameters()
    ]
    in_place = [
        (dotted(name, own_name), p)
        for name, module in modules
        for own_name, p in module._parameters.items()
        if p is not None and id(p) not in of_deltas
    ]
    was_trainable = {**state.was_trainable}
    for name, p in (*in_place, *set_aside):
        named.setdefault(id(p), []).append(name)
        parameters[id(p)] = p
        was_trainable.setdefault(name, p.requires_grad)
    aside = {id(p) for _, p in set_aside}
    declared: list[str] = []
    told = set(state.told_ties)
    for key, names in named.items():
        flag = parameters[key].requires_grad
        if any(name.startswith(under) for name in names):
            reached = bool([name for name in names if name in selection])  # each is asked
            if reached and len(names) > 1 and names[0] not in told:
                told.add(names[0])
                logger.info("%s: one tied parameter, which stays trainable.", " = ".join(names))
            flag = reached and was_trainable[names[0]]
            flags[parameters[key]] = flag
            if flag and key not in aside:
                declared.append(names[0])
        trains = trains or (flag and key not in aside)
    for p, flag in flags.items():
        if p.requires_grad != flag:
            changes.do(p.requires_grad_, flag)
    trained = state.trained.union(declared)
    changes.set(state, was_trainable=was_trainable, told_ties=told, trained=trained)

    if selection.unmatched and warn_unmatched:
        places = {ancestor for n in named.values() for ancestor in lineage(n[0])}
        ends = {place.rpartition(".")[2] for place in places}
        choices = [EVERY_DELTA, *sorted(ends), *sorted(places)]
        for pattern in sorted(selection.unmatched):
            warn(
                f"{pattern!r} names no module or parameter of this {type(backbone).__name__}, "
                "which the delta is on, so nothing more of it stays trainable."
                + nearest(pattern, choices),
                UnmatchedPatternWarning,
            )
    if not trains:
        warn(
            "Nothing is left to train: neither 'deltas' nor anything else was excluded from "
            "freezing. The usual call is freeze_module(exclude=['deltas', 'classifier']).",
            DeltaWarning,
        )
    elif not deltas_train and present:
        warn(
            "All deltas are frozen: only parameters of the backbone are left to train. To train "
            "the deltas too, name them, as in exclude=['deltas', 'classifier'].",
            DeltaWarning,
        )
    return declared


def _host(name: str, own_names: set[str]) -> str:
    """The innermost module of the backbone itself that holds the parameter called `name`."""
    return next((ancestor for ancestor in lineage(name)[1:] if ancestor in own_names), "")


def reached(
    backbone: nn.Module, patterns: Sequence[str], names_of: Callable[[str], Iterable[str]]
) -> list[str]:
    """Names of the backbone's own parameters that `patterns` reach, one per tied parameter."""
    selection = Selection(patterns, names_of)
    first: dict[int, str] = {}
    chosen: dict[str, None] = {}
    for name, p in own_parameters(backbone):
        first.setdefault(id(p), name)
        if name in selection:
            chosen[first[id(p)]] = None
    return list(chosen)
