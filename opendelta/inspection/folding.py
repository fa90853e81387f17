"""Numbers and dotted names, many written as few: ``0,2-5``, ``encoder.layer.0-11.output``."""

from __future__ import annotations

from collections.abc import Iterable

Component = str | tuple[int, ...]


def is_number(name: str) -> bool:
    """Whether a child's name is a plain number, as in ``nn.ModuleList`` and ``nn.Sequential``."""
    return name.isdecimal() and str(int(name)) == name


def number_ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ranges: ``[0, 2, 3, 4, 5]`` gives ``"0,2-5"``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


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
    groups: dict[tuple[Component, ...], list[str]] = {}
    for name in dict.fromkeys(names):
        parts = tuple((int(p),) if is_number(p) else p for p in name.split("."))
        groups[parts] = [name]
    # The innermost number is folded first: in models of several stages (Swin's layers.0.blocks.1)
    # the blocks of one stage belong together.
    for place in reversed(range(max(map(len, groups), default=0))):
        groups = _fold_at(place, groups)
    return {
        ".".join(p if isinstance(p, str) else number_ranges(p) for p in parts): members
        for parts, members in groups.items()
    }


def _fold_at(
    place: int, groups: dict[tuple[Component, ...], list[str]]
) -> dict[tuple[Component, ...], list[str]]:
    """Join the groups that differ in nothing but the number at `place`."""
    alike: dict[tuple[Component | None, ...], list[tuple[Component, ...]]] = {}
    for parts in groups:
        numbered = place < len(parts) and not isinstance(parts[place], str)
        rest = (*parts[:place], None, *parts[place + 1 :]) if numbered else parts
        alike.setdefault(rest, []).append(parts)
    folded: dict[tuple[Component, ...], list[str]] = {}
    for same in alike.values():
        first, members = same[0], [name for parts in same for name in groups[parts]]
        if len(same) > 1:
            numbers = tuple(n for parts in same for n in parts[place] if isinstance(n, int))
            first = (*first[:place], numbers, *first[place + 1 :])
        folded[first] = members
    return folded
