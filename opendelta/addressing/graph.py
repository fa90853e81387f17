"""A backbone's own modules by name, with the questions that naming them asks."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from opendelta.ground.names import ancestors, leaf_of, parent_of
from opendelta.ground.widths import read_widths
from opendelta.mechanism.ownership import own_modules


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
