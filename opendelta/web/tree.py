"""What the page knows about a backbone: its folded module tree and its parameter counts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypedDict

from torch import nn
from torch.nn.parameter import is_lazy

from opendelta.inspection.folding import is_number, number_ranges


class Node(TypedDict):
    """One row of the page: a module, or several numbered siblings of the same structure."""

    label: str  # "attention", or "0-11" for repeated blocks
    names: list[str]  # ["attention"], or ["0", ..., "11"]
    type: str
    parameters: list[str]  # ["weight [768, 768]", "bias [768]"]: the module's own
    children: list[Node]


def _split(name: str) -> tuple[str, str]:
    """``"a.b.c"`` -> its parent's name ``"a.b"`` and its own, ``"c"``."""
    parent, _, own = name.rpartition(".")
    return parent, own


def _describe(name: str, parameter: nn.Parameter) -> str:
    return f"{name} {'[lazy]' if is_lazy(parameter) else list(parameter.shape)}"


def folded_tree(modules: dict[str, nn.Module]) -> list[Node]:
    """The tree below the root, with numbered siblings of the same structure folded into one node.

    Structure means class, names and shapes of parameters, and the same of all children. So T5's
    first block, which holds the position bias, stays apart from its folded siblings ``1-11``.

    Args:
        modules: the bare backbone's modules by full name, parents before their children.
    """
    children: dict[str, list[str]] = {}
    for name in modules:
        if name:
            children.setdefault(_split(name)[0], []).append(name)
    rows = {
        name: [_describe(*item) for item in module.named_parameters(recurse=False)]
        for name, module in modules.items()
    }

    kinds: dict[str, int] = {}  # full name -> a number that modules of one structure share
    numbers: dict[Hashable, int] = {}
    for name in reversed(modules):  # children before their parents
        below = tuple((_split(child)[1], kinds[child]) for child in children.get(name, ()))
        structure = (type(modules[name]), tuple(rows[name]), below)
        kinds[name] = numbers.setdefault(structure, len(numbers))

    def nodes(parent: str) -> list[Node]:
        groups: dict[Hashable, list[str]] = {}
        for child in children.get(parent, ()):
            groups.setdefault(kinds[child] if is_number(_split(child)[1]) else child, []).append(
                child
            )
        return [node(members) for members in groups.values()]

    def node(members: list[str]) -> Node:
        first, names = members[0], [_split(member)[1] for member in members]
        return {
            "label": number_ranges(map(int, names)) if len(names) > 1 else names[0],
            "names": names,
            "type": type(modules[first]).__name__,
            "parameters": rows[first],
            "children": nodes(first),
        }

    return nodes("")


def held_parameters(modules: dict[str, nn.Module]) -> Callable[[list[str]], tuple[int, float]]:
    """A counter of the parameters that modules hold, tied ones once.

    Args:
        modules: the bare backbone's modules by full name, parents before their children.

    Returns:
        A function of full module names: the number of parameters in these modules and below them,
        and its share of the whole backbone, between 0 and 1.
    """
    sizes = {
        name: {id(p): p.numel() for p in module.parameters(recurse=False) if not is_lazy(p)}
        for name, module in modules.items()
    }
    total = sum({key: size for own in sizes.values() for key, size in own.items()}.values())

    def count(names: list[str]) -> tuple[int, float]:
        inside = set(names)
        held: dict[int, int] = {}
        for name in modules:
            if name in inside or (name and _split(name)[0] in inside):
                inside.add(name)
                held.update(sizes[name])
        number = sum(held.values())
        return number, number / total if total else 0.0

    return count
