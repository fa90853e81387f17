"""What trains: freezing a backbone around its deltas (specification 1.20.2, `freeze_module`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from opendelta.addressing.patterns import as_patterns, fold_numbers, lineage, matches_any
from opendelta.backbone_state import BackboneState, own_parameters
from opendelta.exceptions import (
    AddressingError,
    DeltaWarning,
    UnmatchedPatternWarning,
    nearest,
    warn,
)
from opendelta.insertion import ParameterInsertion, own_modules

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
    kept_deltas = [item for item in exclude if not isinstance(item, str)]
    strangers = [item for item in kept_deltas if item not in state.deltas]
    if strangers:
        raise AddressingError(
            f"exclude holds {strangers[0]!r:.80}: expected patterns, 'deltas', or delta objects "
            "of this backbone."
        )
    if EVERY_DELTA in exclude:
        kept_deltas = list(state.deltas)
    texts = as_patterns([item for item in exclude if isinstance(item, str)], "exclude")
    patterns = [pattern for pattern in texts if pattern != EVERY_DELTA]
    selection = Selection(patterns, names_of)
    delta_of = {
        id(p): delta
        for delta in state.deltas
        for insertion in delta.insertions
        for _, p in insertion.named_parameters()
    }
    constant = state.delta_tensors()
    swapped = {id(i.parameter) for i in state.insertions if isinstance(i, ParameterInsertion)}

    own_names = {name for name, _ in own_modules(backbone)} if patterns else set()
    named: dict[int, list[str]] = {}
    parameters = {}
    for name, p in backbone.named_parameters(remove_duplicate=False):
        named.setdefault(id(p), []).append(name)
        parameters[id(p)] = p
        if id(p) not in delta_of:
            state.was_trainable.setdefault(name, p.requires_grad)
    for insertion in state.insertions:
        if not insertion.attached:  # frozen and unfrozen with the rest, for when it comes back
            for name, p in insertion.named_parameters():
                if id(p) not in parameters:
                    named.setdefault(id(p), []).append(name)
                    parameters[id(p)] = p

    under = part + "." if part else ""
    declared = []
    trains = False
    for key, names in named.items():
        p = parameters[key]
        if not any(name.startswith(under) for name in names):
            trains = trains or p.requires_grad
            continue
        delta = delta_of.get(key)
        if delta is None or inside_deltas or key in swapped:
            reached = [name for name in names if name in selection]
        else:  # a pattern for the backbone takes along the deltas inside what it names
            reached = [name for name in names if _host(name, own_names) in selection]
        if delta is not None:
            wanted = bool(reached) or any(delta is kept for kept in kept_deltas)
            if p.is_floating_point():
                p.requires_grad_(wanted and key not in constant)
        else:
            if reached and len(names) > 1 and names[0] not in state.told_ties:
                state.told_ties.add(names[0])
                logger.info("%s: one tied parameter, which stays trainable.", " = ".join(names))
            p.requires_grad_(bool(reached) and state.was_trainable[names[0]])
            if p.requires_grad:
                declared.append(names[0])
        trains = trains or p.requires_grad

    for name, slot in state.slots.items():  # what BitFit set aside is frozen like the rest
        if slot.original is not None and slot.original is not slot.content:
            before = state.was_trainable.setdefault(name, slot.original.requires_grad)
            if name.startswith(under):
                slot.original.requires_grad_(name in selection and before)

    if selection.unmatched and warn_unmatched:
        choices = fold_numbers(ancestor for n in named.values() for ancestor in lineage(n[0]))
        for pattern in sorted(selection.unmatched):
            warn(
                f"{pattern!r} names no module or parameter, so nothing more stays trainable."
                + nearest(pattern, choices),
                UnmatchedPatternWarning,
            )
    if not trains:
        warn(
            "Nothing is left to train: neither 'deltas' nor anything else was excluded from "
            "freezing. The usual call is freeze_module(exclude=['deltas', 'classifier']).",
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
