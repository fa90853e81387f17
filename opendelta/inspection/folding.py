"""Numbers and dotted names, many written as few: ``0,2-5``, ``encoder.layer.0-11.output``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import TypeVar

from opendelta.ground.names import dotted

T = TypeVar("T")


def number_ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ranges: ``[0, 2, 3, 4, 5]`` gives ``"0,2-5"``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def fold(siblings: Iterable[tuple[str, Hashable, T]]) -> list[tuple[str, list[T]]]:
    """Join siblings that are alike in all but their number, as in an ``nn.ModuleList``.

    Args:
        siblings: name, kind (equal for those that are alike), and anything that is meant by them.

    Returns:
        Label (a name, or ``"0,2-5"``) and members, in order of the first ones.
    """
    groups: dict[Hashable, list[tuple[str, T]]] = {}
    for place, (name, kind, member) in enumerate(siblings):
        numbered = name.isdecimal() and str(int(name)) == name
        groups.setdefault((numbered, kind if numbered else place), []).append((name, member))
    folded = []
    for group in groups.values():
        names, members = zip(*group, strict=True)
        label = names[0] if len(names) == 1 else number_ranges(map(int, names))
        folded.append((label, list(members)))
    return folded


def fold_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Group dotted names that differ in numbers only.

    A group is always a full grid: each of its numbers occurs with each of the others. So
    ``0.a.0``, ``0.a.1``, ``1.a.0`` are two groups, ``0.a.0-1`` and ``1.a.0``.

    Args:
        names: e.g. ``["layer.0.query", "layer.1.query", "pooler"]``.

    Returns:
        Pattern -> the names that it stands for, e.g. ``{"layer.0-1.query": ["layer.0.query",
        "layer.1.query"], "pooler": ["pooler"]}``, in order of first appearance.
    """
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    below: dict[str, list[str]] = defaultdict(list)
    for name in order:
        first, _, rest = name.partition(".")
        below[first].append(rest)
    # The innermost number is folded first: in models of several stages (Swin's layers.0.blocks.1)
    # the blocks of one stage belong together.
    siblings = [
        (first, pattern, (pattern, [dotted(first, rest) for rest in inner]))
        for first, rests in below.items()
        for pattern, inner in ({"": [""]} if rests == [""] else fold_names(rests)).items()
    ]
    groups = {
        dotted(label, members[0][0]): [name for _, inner in members for name in inner]
        for label, members in fold(siblings)
    }
    return dict(sorted(groups.items(), key=lambda group: min(map(order.__getitem__, group[1]))))
