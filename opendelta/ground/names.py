"""Dotted names: their parts, their lineage, the words in them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache


def dotted(*parts: str) -> str:
    """The dotted name of `parts`, empty ones left out."""
    return ".".join(filter(None, parts))


def lineage(name: str) -> list[str]:
    """`name` and its ancestors, nearest first: ``a.b.c`` -> ``["a.b.c", "a.b", "a"]``."""
    names = [name]
    while "." in name:
        name = name.rsplit(".", 1)[0]
        names.append(name)
    return names


def fold_numbers(names: Iterable[str]) -> list[str]:
    """Names with their numbers as ``$``, each once: ``layer.0.fc, layer.1.fc -> layer.$.fc``."""
    return list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "$", name) for name in names))


def parent_of(name: str) -> str:
    """The name of the module that holds the one called `name`."""
    return name.rpartition(".")[0]


def leaf_of(name: str) -> str:
    """The last part of `name`."""
    return name.rpartition(".")[2]


def ancestors(name: str) -> Iterator[str]:
    """The modules around `name`, nearest first, the root (``""``) last."""
    while name:
        name = parent_of(name)
        yield name


def innermost(name: str, places: Container[str]) -> str | None:
    """The first of `name` and the modules around it that is one of `places`."""
    return next((place for place in (name, *ancestors(name)) if place in places), None)


def inside(name: str, place: str) -> bool:
    """Whether `name` is `place` or lies below it."""
    return not place or name == place or name.startswith(place + ".")


def below(name: str, place: str) -> str:
    """The path from `place` to `name`, which lies below it."""
    return name[len(place) + 1 :] if place else name


def path_words(name: str) -> list[str]:
    """The words of all parts of a dotted name."""
    return [word for part in name.split(".") for word in words(part)]


@lru_cache(maxsize=65536)
def words(part: str) -> tuple[str, ...]:
    """The lower-case words of one part of a name: ``EncDecAttn1`` -> enc, dec, attn, 1."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", part)
    return tuple(re.findall(r"[a-z]+|\d+", spaced.lower()))


def numbered(base: str) -> Iterator[str]:
    """``base, base_1, base_2, ...``: the names of several deltas of one kind on one module."""
    return itertools.chain([base], (f"{base}_{count}" for count in itertools.count(1)))
