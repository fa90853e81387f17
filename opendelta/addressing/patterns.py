"""Matching of names: dot-bounded suffixes and `[r]` regular expressions (specification 1.15).

A pattern addresses a name from its end. ``"attention.out_lin"`` reaches
``transformer.layer.3.attention.out_lin``, ``"0.attention"`` reaches ``layer.0.attention`` but not
``layer.10.attention``. After ``[r]`` the rest is a regular expression that must match from a dot
(or the beginning) to the end of the name: ``"[r][0-5]\\.attention"``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from opendelta.exceptions import AddressingError
from opendelta.ground.names import lineage

REGEX_MARK = "[r]"


def as_patterns(value: Any, argument: str) -> list[str]:
    """A user's `modified_modules` and the like as a list of patterns.

    Args:
        value: None, one string, or a list or tuple of strings.
        argument: the argument's name, for the error message.

    Raises:
        AddressingError: if `value` is anything else, or a pattern is empty.
    """
    if value is None:
        return []
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise AddressingError(
            f"{argument}={value!r}: expected a list of strings, such as ['attn.q'] or "
            "['[r][0-5]\\.fc2']."
        )
    if any(not pattern.strip() for pattern in patterns):
        raise AddressingError(f"{argument}={value!r} holds an empty pattern.")
    return list(patterns)


@lru_cache(maxsize=4096)
def _regex(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:^|\.)(?:{expression})$")
    except re.error as error:
        raise AddressingError(
            f"'{REGEX_MARK}{expression}' is not a valid regular expression: {error}."
        ) from error


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` addresses the module or parameter called `name`."""
    if pattern.startswith(REGEX_MARK):
        return _regex(pattern[len(REGEX_MARK) :]).search(name) is not None
    return name == pattern or name.endswith("." + pattern)


def matches_any(names: Iterable[str], pattern: str) -> bool:
    """Whether `pattern` addresses one of `names` (a module's own name and its common names)."""
    return any(matches(name, pattern) for name in names)


# The four functions of 0.3.2 (specification 1.23.4) ------------------------------------------


def superstring_in(str_a: str, list_b: list[str]) -> bool:
    """Whether any string in `list_b` contains `str_a`."""
    return any(str_a in b for b in list_b)


def is_child_key(str_a: str, list_b: list[str]) -> bool:
    """Whether some string in `list_b` equals `str_a` or is its dotted ancestor."""
    return any(ancestor in list_b for ancestor in lineage(str_a))


def endswith_in_normal(str_a: str, list_b: list[str]) -> bool:
    """Whether `str_a` ends, at a dot, with some string in `list_b`."""
    return any(str_a == b or str_a.endswith("." + b) for b in list_b)


def endswith_in_regex(str_a: str, list_b: list[str]) -> bool:
    """Whether `str_a` ends, at a dot, with a match of some regular expression in `list_b`."""
    return any(_regex(b).search(str_a) is not None for b in list_b)
