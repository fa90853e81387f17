"""A backbone's own modules by name, with the questions that naming them asks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

from torch import nn

from opendelta.ownership import own_modules
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


def below(name: str, place: str) -> str:
    """The path from `place` to `name`, which lies below it."""
    return name[len(place) + 1 :] if place else name


@lru_cache(maxsize=65536)
def words(part: str) -> tuple[str, ...]:
    """The lower-case words of one part of a name: ``EncDecAttn1`` -> enc, dec, attn, 1."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", part)
    return tuple(re.findall(r"[a-z]+|\d+", spaced.lower()))


class Graph:
    """The module graph of a backbone, deltas left out.

    Attributes:
        modules: every module under its first name, in order of `named_modules`.
        children: for each of them the names (without path) of those that it holds directly.
        linears: (input, output) widths of the modules that multiply by a matrix: linear layers of
            any kind, and convolutions that mix channels.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.children: dict[str, list[str]] = defaultdict(list)
        self.linears: dict[str, tuple[int, int]] = {}
        self._linears_below: dict[str, list[str]] = defaultdict(list)
        self._last_inside: dict[str, int] = {}
        for name, module in own_modules(root):
            if ".parametrizations." in name or name.endswith(".parametrizations"):
                continue  # of the tensor that they compute, not of the network
            self._last_inside[name] = number = len(self.modules)
            self.modules[name] = module
            if name:
                self.children[parent_of(name)].append(leaf_of(name))
            widths = _linear_widths(module)
            if widths is not None:
                self.linears[name] = widths
            for place in ancestors(name):
                self._last_inside[place] = number
                if widths is not None:
                    self._linears_below[place].append(name)
        self._names = list(self.modules)
        self._number = {name: number for number, name in enumerate(self._names)}

    def inside_of(self, name: str) -> list[str]:
        """The module called `name` and all modules inside it."""
        return self._names[self._number[name] : self._last_inside[name] + 1]

    def linears_below(self, name: str) -> list[str]:
        """The linear layers inside the module called `name`, not counting itself."""
        return self._linears_below.get(name, [])

    def is_element(self, name: str) -> bool:
        """Whether the module called `name` is an element of a list of modules."""
        return leaf_of(name).isdigit() and all(
            child.isdigit() for child in self.children[parent_of(name)]
        )


def _linear_widths(module: nn.Module) -> tuple[int, int] | None:
    if not any(_has(module, name) for name in ("in_features", "in_channels", "nx")):
        return None
    if not (module._parameters or module._buffers or _has(module, "in_features")):
        return None
    return None if is_depthwise(module) else read_widths(module)


def _has(module: nn.Module, attribute: str) -> bool:
    """`hasattr` for plain attributes, without the slow search of parameters and submodules."""
    return attribute in vars(module) or hasattr(type(module), attribute)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that mixes positions but not channels."""
    groups = getattr(module, "groups", 1)
    return groups != 1 and groups == getattr(module, "in_channels", 0)
