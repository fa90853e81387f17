"""`Visualization`: the structure of any model as a tree, folded to what fits on a screen.

Names are white, classes green, trainable parameters cyan, frozen ones grey, those of deltas
purple, and folded numbers red::

    root
    ├── embedding (Embedding) weight:[10, 5]
    └── name_b (Sequential)
        └── 0-1(ToyBlock)
            └── name_a (Linear) weight:[5, 5] bias:[5]
                └── lora (LowRankLinear) lora_A:[2, 5] lora_B:[5, 2]

The interface is that of ``bigmodelvis.Visualization``. What is different:

- Only numbered modules fold, so each name that one can address stands on its own line (bigmodelvis
  writes ``query,key,value(Linear)`` and so changes their order).
- The root's own parameters are shown; modules without any parameter are left out at every depth.
- ``common_structure=True`` needs no mapping, and shows deltas and unmapped modules too.
- Linear time; nothing starts a debugger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.backends.sharding import full_shape
from opendelta.ground.names import ancestors, below, dotted, innermost, inside, leaf_of, parent_of
from opendelta.ground.walk import unblocked
from opendelta.inspection.display import notebook_cell, show
from opendelta.inspection.tree import (
    DELTA,
    FROZEN,
    TRAINABLE,
    TYPE,
    UNCOMMON,
    VIRTUAL,
    ModuleTree,
)
from opendelta.mechanism.dispatch import Seat
from opendelta.mechanism.ownership import inserted_names, inserted_parameters, own_modules


class Visualization:
    """Draws the structure of a model.

    Example:
        >>> tree = Visualization(model).structure_graph()

    Args:
        plm: any module, with or without deltas.
    """

    def __init__(self, plm: nn.Module) -> None:
        self.plm = plm
        self.rootname = "root"
        self.keep_non_params = False
        self.only_common = False

    def structure_graph(
        self,
        rootname: str = "root",
        expand_params: bool = False,
        keep_non_params: bool = False,
        common_structure: bool = False,
        mapping: Mapping[str, Any] | None = None,
        only_common: bool = False,
        printTree: bool = True,
    ) -> ModuleTree:
        """Draw the model, in a terminal, a notebook or a pipe.

        Args:
            rootname: what the root is called.
            expand_params: give each parameter a line of its own.
            keep_non_params: also show modules without parameters, such as ``nn.Dropout``.
            common_structure: use the common names (``attn.q``, ``ff.w1``); modules without one
                are grey.
            mapping: the nested ``{"original": {"__name__": "common", ...}}`` to take the common
                names from; by default those of `CommonStructureMap`.
            only_common: leave out modules without a common name.
            printTree: print the tree; otherwise it is only returned.

        Returns:
            The tree. ``str(tree)`` is its plain text.

        Raises:
            RuntimeError: for `keep_non_params` together with `common_structure`.
        """
        if keep_non_params and common_structure:
            raise RuntimeError(
                "keep_non_params cannot be used with common_structure: the common structure names "
                "modules with parameters only. Leave out one of the two."
            )
        self.rootname, self.keep_non_params = rootname, keep_non_params
        self.only_common = only_common
        if common_structure:
            rules = _mapping_of(self.plm) if mapping is None else mapping
            tree = self.build_common_tree(self.plm, rules)
        else:
            tree = self._describe(rootname, self.plm, is_delta=False, above=())
            tree.info = None
        tree.fold()
        tree.write_labels(expand_params)
        if printTree:
            show(tree)
            tree.printed_in = notebook_cell()
        return tree

    def _repr_html_(self) -> str:
        return self.structure_graph(self.rootname, printTree=False)._repr_html_()

    def _describe(
        self, name: str, module: nn.Module, is_delta: bool, above: tuple[nn.Module, ...]
    ) -> ModuleTree:
        """The subtree of `module`. `above`: the modules that it sits in."""
        node = ModuleTree(name, type(module).__name__)
        node.parameters = _parameters(module, is_delta)
        if any(module is outer for outer in above):  # a module that holds one of its parents
            return node
        deltas = inserted_names(module)
        for child_name, child in _children(module):
            child_is_delta = is_delta or child_name in deltas
            child_node = self._describe(child_name, child, child_is_delta, (*above, module))
            if self.keep_non_params or child_node.parameters or child_node.children:
                node.children.append(child_node)
        return node

    # --- common structure -------------------------------------------------------------------------

    def build_common_tree(
        self,
        module: nn.Module,
        mapping: Mapping[str, Any],
        tree: ModuleTree | None = None,
        query: str = "",
        key_to_root: str = "",
    ) -> ModuleTree:
        """Add the modules inside `module` to `tree`, under their common names.

        A key of `mapping` is a child's name, a dotted path (``"self.query"``), or ``"$"`` for any
        name. Its ``"__name__"`` is the common name: ``"a.b"`` puts it into a virtual node ``a``,
        ``""`` says that there is none, ``"$"`` keeps the original.

        Args:
            module: where to start.
            mapping: the names of the modules inside `module`.
            tree: the node of `module`, by default a new root.
            query: the path from that node to `module`, with a dot at its end, where `module`
                itself has no common name.
            key_to_root: the original path from the root to `module`.

        Returns:
            `tree`, not folded yet and without labels.
        """
        tree = ModuleTree(self.rootname) if tree is None else tree
        if not query and not key_to_root:
            tree.parameters += _parameters(module)
        deltas = inserted_names(module)
        for name, child in _children(module):
            key, path = query + name, dotted(key_to_root, name)
            rule = mapping.get(key, mapping.get("$"))
            common = None if rule is None else rule["__name__"]
            if name in deltas:
                node = self._describe(key, child, is_delta=True, above=())
                if node.parameters or node.children:
                    tree.append(node)
            elif common:
                parts = [name if part == "$" else part for part in common.split(".")]
                self.build_common_tree(child, rule, _add_common(tree, parts, child), "", path)
            elif common is None or self.only_common:
                if not self.only_common and _parameters(child):
                    _add_uncommon(tree, key, child)
                self.build_common_tree(child, rule or mapping, tree, key + ".", path)
            else:
                self.build_common_tree(child, rule, _add_uncommon(tree, key, child), "", path)
        return tree


def _mapping_of(model: nn.Module) -> dict[str, Any]:
    """`CommonStructureMap`'s names as the nested mapping that `build_common_tree` reads."""
    common_names = CommonStructureMap(model, strict=False).matched_pairs
    # A wrapper has no common name, but keeps its own in those of the modules in it (`bert`).
    wrappers = {place for common in common_names.values() for place in ancestors(common)}
    found: dict[str, tuple[str, dict[str, Any]]] = {"": ("", {})}
    for name, _ in own_modules(model):
        common = common_names.get(name, name if name in wrappers else "")
        if common:
            above = innermost(parent_of(name), found) or ""
            common_above, rules = found[above]
            is_below = inside(parent_of(common), common_above)
            own = below(common, common_above) if is_below else leaf_of(common)
            found[name] = common, rules.setdefault(below(name, above), {"__name__": own})
    return found[""][1]


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if child is not None:
            yield name, child.delta if isinstance(child, Seat) else unblocked(child)


def _parameters(module: nn.Module, is_delta: bool = False) -> list[tuple[str, str]]:
    """What is shown of a module's own parameters: ``("weight:[64, 64]", colour)`` each."""
    of_deltas = inserted_parameters(module)
    shown = []
    for name, p in module._parameters.items():
        if p is not None:
            shape = "?" if is_lazy(p) else ", ".join(map(str, full_shape(p)))
            color = TRAINABLE if p.requires_grad else FROZEN
            shown.append((f"{name}:[{shape}]", DELTA if is_delta or name in of_deltas else color))
    return shown


def _add_common(tree: ModuleTree, parts: list[str], module: nn.Module) -> ModuleTree:
    """The node at `parts` below `tree`, with `module` in it and virtual nodes on the way."""
    for part in parts[:-1]:
        tree = tree.common_child(part) or tree.append(
            ModuleTree(part, "Virtual", info_color=VIRTUAL)
        )
    shown = _parameters(module)
    node = tree.common_child(parts[-1])
    if node is None or (node.parameters and shown):  # two norms of one name stay two
        node = tree.append(ModuleTree(parts[-1]))
    known = [] if node.info is None or node.info_color == VIRTUAL else node.info.split(",")
    node.info = ",".join(dict.fromkeys([*known, type(module).__name__]))
    node.info_color = TYPE
    node.parameters += shown
    return node


def _add_uncommon(tree: ModuleTree, key: str, module: nn.Module) -> ModuleTree:
    node = ModuleTree(key, type(module).__name__, False, UNCOMMON, UNCOMMON)
    node.parameters = _parameters(module)
    return tree.append(node)
