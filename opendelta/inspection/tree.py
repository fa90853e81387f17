"""The tree of a model: its nodes are modules, equal numbered ones folded."""

from __future__ import annotations

import html
from collections.abc import Iterator

from rich.markup import escape
from rich.tree import Tree

from opendelta.inspection.display import notebook_cell, plain_text, show_in_notebook
from opendelta.inspection.folding import fold

NAME = "white"
TYPE = "green"
TRAINABLE = "cyan"
FROZEN = "grey50"
REPEATED = "red"
DELTA = "rgb(175,0,255)"
VIRTUAL = "orange1"
UNCOMMON = "grey50"

_CSS = {  # notebooks have light and dark pages: a name takes the page's own colour
    NAME: "inherit",
    TYPE: "#2a9134",
    TRAINABLE: "#0097a7",
    FROZEN: "#808080",
    REPEATED: "#d7263d",
    DELTA: "#b14bff",
    VIRTUAL: "#d97706",
}


class ModuleTree(Tree):
    """A module in the picture, or several equal ones; its children are the modules inside it.

    It prints itself: ``print(tree)`` gives plain text, ``rich.print(tree)`` colours, a notebook a
    tree that folds and unfolds.

    Args:
        module_name: the module's name in its parent, such as ``"query"`` or, folded, ``"0-11"``.
        info: the name of the module's class; for a line of its own that shows a parameter, that
            parameter (``"weight:[64, 64]"``).
        is_param_node: whether this is such a line.
        name_color: colour of the name; `info_color`: colour of the class or parameter.

    Attributes:
        names: the module's name or, once folded, those of all that the node stands for.
        parameters: what is shown of the module's own parameters, ``(text, colour)`` each.
        printed_in: number of the notebook cell that has printed the tree already.
        label: rich markup, e.g. ``"[white]query [green](Linear) [cyan]weight:[64, 64]"``.
    """

    def __init__(
        self,
        module_name: str | None = None,
        info: str | None = None,
        is_param_node: bool = False,
        name_color: str = NAME,
        info_color: str = TYPE,
    ) -> None:
        super().__init__("")
        self.module_name, self.info, self.is_param_node = module_name, info, is_param_node
        self.name_color, self.info_color = name_color, info_color
        self.names = [module_name or ""]
        self.parameters: list[tuple[str, str]] = []
        self.children: list[ModuleTree] = []  # type: ignore[assignment]
        self.printed_in: int | None = None

    def common_child(self, module_name: str) -> ModuleTree | None:
        """The child with this common name, or None."""
        common = (c for c in self.children if c.name_color != UNCOMMON)
        return next((c for c in common if c.module_name == module_name), None)

    def append(self, node: ModuleTree) -> ModuleTree:
        """Make `node` the last child, and return it."""
        self.children.append(node)
        return node

    # --- folding --------------------------------------------------------------------------------

    def fold(self) -> None:
        """Join numbered children that are equal in all but their number, at every level."""
        self._fold({})

    def _fold(self, known: dict[object, int]) -> int:
        """Fold, and return a number that equal subtrees share (their own name left aside)."""
        siblings = []
        for child in self.children:
            kind = child._fold(known)
            siblings.append((child.module_name or "", kind, (child, kind)))
        content: list[object] = [self.info, self.name_color, self.info_color, *self.parameters]
        self.children = []
        for label, members in fold(siblings):
            node, kind = members[0]
            if len(members) > 1:
                node.names = [member.module_name or "" for member, _ in members]
                node.module_name, node.name_color = label, REPEATED
            self.children.append(node)
            content.append((label, kind))
        return known.setdefault(tuple(content), len(known))

    # --- writing --------------------------------------------------------------------------------

    def write_labels(self, expand_params: bool = False) -> None:
        """Set the labels; `expand_params` gives each parameter a line of its own."""
        for child in self.children:
            child.write_labels(expand_params)
        if expand_params:
            lines = [ModuleTree(None, text, True, info_color=c) for text, c in self.parameters]
            for line in lines:
                line.write_labels()
            self.parameters, self.children[:0] = [], lines
        self.label = "".join(f"[{color}]{escape(text)}" for text, color in self._pieces())

    def _pieces(self) -> Iterator[tuple[str, str]]:
        """The label as ``(text, colour)`` pairs."""
        if self.is_param_node:
            yield self.info or "", self.info_color
            return
        yield self.module_name or "", self.name_color
        if self.info is not None:
            space = "" if self.name_color == REPEATED else " "  # 0-11(BertLayer), query (Linear)
            yield f"{space}({self.info})", self.info_color
        for text, color in self.parameters:
            yield f" {text}", color

    def __str__(self) -> str:
        return plain_text(self)

    def _repr_html_(self) -> str:
        """Nested ``<details>``: a tree that a click folds and unfolds, without any script."""
        return f'<div style="font-family:monospace;line-height:1.5">{self._html()}</div>'

    def _html(self) -> str:
        label = "".join(
            f'<span style="color:{_CSS[color]};white-space:pre">{html.escape(text)}</span>'
            for text, color in self._pieces()
        )
        if not self.children:
            return f'<div style="margin-left:1em">{label}</div>'
        inside = "".join(child._html() for child in self.children)
        return (
            f"<details open><summary>{label}</summary>"
            f'<div style="margin-left:1.5em">{inside}</div></details>'
        )

    def _ipython_display_(self) -> None:
        """What IPython calls to show the last value of a cell, unless that cell printed it."""
        if self.printed_in is None or self.printed_in != notebook_cell():
            show_in_notebook({"text/plain": str(self), "text/html": self._repr_html_()}, raw=True)
