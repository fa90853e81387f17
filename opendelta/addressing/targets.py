"""From patterns to the modules of a backbone that a delta will modify."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from opendelta.addressing.patterns import REGEX_MARK
from opendelta.exceptions import AddressingError, UnmatchedPatternWarning, nearest, warn

Find = Callable[[str], list[str]]  # the modules that a pattern addresses


def find_targets(
    patterns: Sequence[str], find: Find, known: Sequence[str], offer: Callable[[str], str]
) -> list[list[str]]:
    """The modules that each pattern addresses.

    Args:
        patterns: what to look for.
        find: which modules one of them addresses.
        known: the names that patterns may address, for the error.
        offer: tells for a pattern without hits what there is, for the error.

    Returns:
        One list of module names for each pattern.

    Raises:
        AddressingError: naming the pattern that addresses nothing and the nearest names.
    """
    found = [find(pattern) for pattern in patterns]
    for pattern, hits in zip(patterns, found, strict=True):
        if not hits:
            regex = not pattern.startswith(REGEX_MARK) and set(pattern) & set("*+?|()[]^\\")
            hint = f" A regular expression begins with {REGEX_MARK!r}." if regex else ""
            raise AddressingError(
                f"modified_modules: {pattern!r} addresses no module of the backbone."
                + nearest(pattern, [*known, *_suffixes(known)])
                + hint
                + f" {offer(pattern)}"
            )
    return found


def common_name_hint(hits: Sequence[str]) -> str:
    """For a pattern that is no name of a module but a common one."""
    if not hits:
        return ""
    return f"It is a common name, of {hits[0]!r} for one: pass common_structure=True. "


def own_name_hint(hits: Sequence[str]) -> str:
    """For a pattern that is no common name but one of the backbone's own."""
    if not hits:
        return ""
    return f"It is the backbone's own name of {hits[0]!r}: leave out common_structure=True. "


def offer_names(names: Sequence[str]) -> str:
    """What a backbone offers to patterns: how its innermost modules are called, and the default."""
    outer = {name.rpartition(".")[0] for name in names}
    leaves = (name.rpartition(".")[2] for name in names if name not in outer)
    called = list(dict.fromkeys(leaf for leaf in leaves if not leaf.isdigit()))
    shown = ", ".join(called[:12]) + (", ..." if len(called) > 12 else "")
    return (
        f"Its innermost modules are called {shown} (`opendelta.Visualization(model)"
        ".structure_graph()` shows all). Without modified_modules a delta goes to its usual places."
    )


def excluded_modules(patterns: Sequence[str], find: Find, known: Sequence[str]) -> set[str]:
    """The modules that `exclude_modules` addresses; those inside them are excluded too.

    Warns:
        UnmatchedPatternWarning: for a pattern that addresses nothing.
    """
    excluded: set[str] = set()
    for pattern in patterns:
        hits = find(pattern)
        if not hits:
            warn(
                f"exclude_modules: {pattern!r} addresses no module, so it excludes nothing."
                + nearest(pattern, [*known, *_suffixes(known)]),
                UnmatchedPatternWarning,
            )
        excluded.update(hits)
    return excluded


def _suffixes(names: Iterable[str]) -> list[str]:
    """The dotted ends of names, short ones first, as candidates for a near miss."""
    ends = {name.split(".", start)[-1] for name in names for start in range(name.count(".") + 1)}
    return sorted(ends, key=lambda end: (end.count("."), end))
