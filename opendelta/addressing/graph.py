"""A backbone's own modules by name, with the questions that naming them asks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from opendelta.insertion import own_modules
from opendelta.sizes import read_widths


def join(*parts: str) -> str:
    """The dotted name of `parts`, empty ones left out."""
    return ".".join(part for part in parts if part)


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


def inside(name: str, place: str) -> bool:
    """Whether `name` is `place` or lies below it."""
    return not place or name == place or name.startswith(place + ".")


def words(name: str) -> list[str]:
    """The lower-case words of one part of a name: ``EncDecAttention`` -> enc, dec, attention."""
    spaced = re.sub(r"([a-z])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", name)
    return [word.lower() for word in re.findall(r"[A-Za-z]+|\d+", spaced)]


class Graph:
    """The module graph of a backbone, deltas left out.

    Attributes:
        modules: every module under its first name, in order of `named_modules`.
        children: for each of them the names (without path) of those that it holds directly.
        linears: (input, output) widths of the modules that multiply by a matrix: linear layers of
            any kind, plain and pointwise convolutions.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(own_modules(root))
        self.children: dict[str, list[str]] = defaultdict(list)
        for name in self.modules:
            if name:
                self.children[parent_of(name)].append(leaf_of(name))
        self.linears = {
            name: widths
            for name, module in self.modules.items()
            if (widths := _linear_widths(module)) is not None
        }
        self._linears_below: dict[str, list[str]] = defaultdict(list)
        for name in self.linears:
            for place in ancestors(name):
                self._linears_below[place].append(name)

    def linears_below(self, name: str) -> list[str]:
        """The linear layers inside the module called `name`."""
        return self._linears_below.get(name, [])


def _linear_widths(module: nn.Module) -> tuple[int, int] | None:
    if hasattr(module, "num_embeddings") or hasattr(module, "normalized_shape"):
        return None
    if getattr(module, "groups", 1) != 1:  # depthwise: mixes positions, not channels
        return None
    if not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()):
        return None  # remembers widths for another reason
    return read_widths(module)
