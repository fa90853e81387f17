"""What the page knows about a backbone: its folded module tree and its parameter counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from torch import nn
from torch.nn.parameter import is_lazy

from opendelta.ground.names import innermost, leaf_of, parent_of
from opendelta.inspection.tree import FROZEN, ModuleTree


class Node(TypedDict):
    """One row of the page: a module, or several numbered siblings of the same structure."""

    label: str  # "attention", or "0-11" for repeated blocks
    names: list[str]  # ["attention"], or ["0", ..., "11"]
    type: str
    parameters: list[str]  # ["weight [768, 768]", "bias [768]"]: the module's own
    children: list[Node]


def folded_tree(modules: dict[str, nn.Module]) -> list[Node]:
    """The tree below the root, with numbered siblings of the same structure folded into one node.

    Structure means class, names and shapes of parameters, and the same of all children. So T5's
    first block, which holds the position bias, stays apart from its folded siblings ``1-11``.

    Args:
        modules: the bare backbone's modules by full name, parents before their children.
    """
    trees: dict[str, ModuleTree] = {}
    for name, module in modules.items():
        tree = trees[name] = ModuleTree(leaf_of(name), type(module).__name__)
        for own, p in module.named_parameters(recurse=False):
            shape = "[lazy]" if is_lazy(p) else list(p.shape)
            tree.parameters.append((f"{own} {shape}", FROZEN))
        if name:
            trees[parent_of(name)].children.append(tree)
    trees[""].fold()
    return [_node(tree) for tree in trees[""].children]


def _node(tree: ModuleTree) -> Node:
    return {
        "label": tree.module_name or "",
        "names": tree.names,
        "type": tree.info or "",
        "parameters": [text for text, _ in tree.parameters],
        "children": [_node(child) for child in tree.children],
    }


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
        chosen, held = set(names), dict[int, int]()
        for name, own in sizes.items():
            if innermost(name, chosen) is not None:
                held |= own
        number = sum(held.values())
        return number, number / total if total else 0.0

    return count
