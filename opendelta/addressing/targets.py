"""From patterns to the modules of a backbone that a delta will modify."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from opendelta.addressing.patterns import REGEX_MARK, fold_numbers, matches_any
from opendelta.exceptions import AddressingError, UnmatchedPatternWarning, nearest, warn

NamesOf = Callable[[str], Iterable[str]]


def matched_modules(names: Sequence[str], pattern: str, names_of: NamesOf) -> list[str]:
    """Those of `names` that `pattern` addresses by one of their names, in module order."""
    return [name for name in names if name and matches_any(names_of(name), pattern)]


def find_targets(
    names: Sequence[str], patterns: Sequence[str], names_of: NamesOf, *, required: bool
) -> list[list[str]]:
    """The modules that each pattern addresses.

    Args:
        names: names of the backbone's own modules, in module order.
        patterns: what to look for.
        names_of: the names by which a module may be addressed.
        required: whether each pattern must address something (the user's own), or only one of
            them all (a method's defaults).

    Returns:
        One list of module names for each pattern.

    Raises:
        AddressingError: naming the pattern that addresses nothing and the nearest names.
    """
    found = [matched_modules(names, pattern, names_of) for pattern in patterns]
    empty = [pattern for pattern, hits in zip(patterns, found, strict=True) if not hits]
    if empty and (required or len(empty) == len(patterns)):
        known = list(dict.fromkeys(other for name in names if name for other in names_of(name)))
        folded = fold_numbers(known)
        shown = ", ".join(folded[:8]) + (", ..." if len(folded) > 8 else "")
        if not required:
            raise AddressingError(
                f"The backbone has none of the default places, {', '.join(map(repr, patterns))}; "
                f"by their common names its modules are {shown} ($ is any number; "
                "`print(opendelta.CommonStructureMap(model).explain())` shows which is which). "
                "Name the modules to modify with modified_modules=[...]."
            )
        regex = not empty[0].startswith(REGEX_MARK) and set(empty[0]) & set("*+?|()[]^\\")
        hint = f" A regular expression begins with {REGEX_MARK!r}." if regex else ""
        raise AddressingError(
            f"modified_modules: {empty[0]!r} addresses no module of the backbone."
            + nearest(empty[0], [*known, *_suffixes(known)])
            + hint
            + f" Its modules are {shown}, where $ is any number "
            "(`opendelta.Visualization(model).structure_graph()` shows them)."
        )
    return found


def excluded_modules(names: Sequence[str], patterns: Sequence[str], names_of: NamesOf) -> set[str]:
    """The modules that `exclude_modules` addresses; those inside them are excluded too.

    Warns:
        UnmatchedPatternWarning: for a pattern that addresses nothing.
    """
    excluded: set[str] = set()
    for pattern in patterns:
        hits = matched_modules(names, pattern, names_of)
        if not hits:
            warn(
                f"exclude_modules: {pattern!r} addresses no module, so it excludes nothing."
                + nearest(pattern, [*names, *_suffixes(names)]),
                UnmatchedPatternWarning,
            )
        excluded.update(hits)
    return excluded


def _suffixes(names: Iterable[str]) -> list[str]:
    """The dotted ends of names, short ones first, as candidates for a near miss."""
    ends = {name.split(".", start)[-1] for name in names for start in range(name.count(".") + 1)}
    return sorted(ends, key=lambda end: (end.count("."), end))
