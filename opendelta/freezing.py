"""What trains: freezing a backbone around its deltas (specification 1.20.2, `freeze_module`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from opendelta.addressing.patterns import as_patterns, matches_any
from opendelta.exceptions import (
    AddressingError,
    DeltaWarning,
    UnmatchedPatternWarning,
    nearest,
    warn,
)
from opendelta.ground.names import dotted, lineage
from opendelta.mechanism.backbone_state import BackboneState, own_parameters
from opendelta.mechanism.insertion import ParameterInsertion
from opendelta.mechanism.ownership import own_modules

if TYPE_CHECKING:
    from opendelta.basemodel import DeltaBase

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
    state: BackboneState,
    backbone: nn.Module,
    part: str,
    exclude: Sequence[str | DeltaBase],
    *,
    names_of: Callable[[str], Iterable[str]],
    inside_deltas: bool,
    warn_unmatched: bool,
) -> list[str]:
    """Freeze all parameters under `part` but those that `exclude` names.

    Args:
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
    present = [delta for _, found in states for delta in found.deltas]
    for delta in present:
        delta.look_at_places()
    kept_deltas = [item for item in exclude if not isinstance(item, str)]
    strangers = [item for item in kept_deltas if not any(item is delta for delta in present)]
    if strangers:
        (item, *_) = strangers
        said = "one" if isinstance(item, nn.Module) else f"{item!r:.80}"  # modules print long
        raise AddressingError(
            f"exclude holds {said} of type {type(item).__name__}; expected patterns, 'deltas', or "
            "delta objects of this backbone."
        )
    if EVERY_DELTA in exclude:
        kept_deltas = present
    texts = as_patterns([item for item in exclude if isinstance(item, str)], "exclude")
    patterns = [pattern for pattern in texts if pattern != EVERY_DELTA]
    selection = Selection(patterns, names_of)
    under = part + "." if part else ""

    own_names = {name for name, _ in modules}
    of_deltas: set[int] = set()
    trains = False
    for root, found in states:
        for delta in found.deltas:
            kept = any(delta is item for item in kept_deltas)
            constant = {id(tensor) for tensor in delta.constants()}
            for insertion in delta.insertions:
                for name, p in insertion.named_parameters():
                    name = dotted(root, name)
                    of_deltas.add(id(p))
                    if not name.startswith(under) or not p.is_floating_point():
                        trains = trains or p.requires_grad
                        continue
                    # A pattern for the backbone takes along the deltas inside what it names.
                    by_name = inside_deltas or isinstance(insertion, ParameterInsertion)
                    reached = bool(patterns) and (
                        (name if by_name else _host(name, own_names)) in selection
                    )
                    p.requires_grad_((kept or reached) and id(p) not in constant)
                    trains = trains or p.requires_grad
    deltas_train = trains

    named: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    set_aside = [  # what BitFit set aside is frozen like the rest
        (dotted(root, name), slot.original)
        for root, found in states
        for name, slot in found.slots.items()
        if slot.original is not None and slot.top is not None
    ]
    in_place = [
        (dotted(name, own_name), p)
        for name, module in modules
        for own_name, p in module._parameters.items()
        if p is not None and id(p) not in of_deltas
    ]
    for name, p in (*in_place, *set_aside):
        named.setdefault(id(p), []).append(name)
        parameters[id(p)] = p
        state.was_trainable.setdefault(name, p.requires_grad)
    aside = {id(p) for _, p in set_aside}
    declared = []
    for key, names in named.items():
        p = parameters[key]
        if any(name.startswith(under) for name in names):
            hits = [name for name in names if name in selection]
            reached = bool(hits)
            if reached and len(names) > 1 and names[0] not in state.told_ties:
                state.told_ties.add(names[0])
                logger.info("%s: one tied parameter, which stays trainable.", " = ".join(names))
            p.requires_grad_(reached and state.was_trainable[names[0]])
            if p.requires_grad and key not in aside:
                declared.append(names[0])
                state.trained.add(names[0])
        trains = trains or (p.requires_grad and key not in aside)

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
