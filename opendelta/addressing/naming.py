"""The common names of a backbone's modules, from the families' tables and from inferred blocks."""

from __future__ import annotations

from dataclasses import dataclass

from opendelta.addressing.family_trees import family_at
from opendelta.addressing.graph import Graph
from opendelta.addressing.inference import find_blocks, is_norm
from opendelta.addressing.roles import Block
from opendelta.addressing.towers import find_towers, input_embeddings, output_embeddings
from opendelta.exceptions import AddressingError, nearest
from opendelta.ground.names import (
    below,
    dotted,
    innermost,
    inside,
    leaf_of,
    parent_of,
    path_words,
    words,
)


@dataclass(frozen=True)
class Named:
    """What is known of a module: its common name, the block it is in, its role there, and why."""

    common: str
    block: str
    role: str
    why: str


class Naming:
    """Names the modules of a graph.

    Args:
        graph: the backbone.
        scope: which tower gets names, see `CommonStructureMap`.

    Attributes:
        named: what has a common name, in module order.
        towers: where each tower sits, by its short name.

    Raises:
        AddressingError: if there is no tower called `scope`.
    """

    def __init__(self, graph: Graph, scope: str | None) -> None:
        self.graph = graph
        self.named: dict[str, Named] = {}
        self._lists: dict[str, str] = {}  # list of blocks -> its common name
        trees = [(place, *found) for place in graph.modules if (found := family_at(graph, place))]
        in_trees = {n for _, _, names in trees for n, common in names.items() if _is_block(common)}
        blocks = find_blocks(graph, in_trees)
        stacks = list(dict.fromkeys(map(_stack_of, (*in_trees, *(b.place for b in blocks)))))
        embeddings, head = input_embeddings(graph), output_embeddings(graph)
        self.towers, kept = find_towers(graph, stacks, embeddings)
        if scope == "all":
            kept = stacks
        elif scope is not None:
            if scope not in self.towers:
                raise AddressingError(
                    f"scope={scope!r}: {type(graph.modules['']).__name__} has no such tower, only "
                    f"{[*self.towers, 'all']}." + nearest(scope, self.towers)
                )
            kept = [stack for stack in stacks if inside(stack, self.towers[scope])]
        for _, family, names in trees:
            if any(_is_block(common) and _stack_of(n) in kept for n, common in names.items()):
                self._add_tree(names, f"by the tree of {family}")
        causal = self._causal(blocks)
        for block in blocks:
            if _stack_of(block.place) in kept:
                self._add_block(block, causal)
        if embeddings is not None and not any(inside(embeddings, place) for place, _, _ in trees):
            self._add_outer(embeddings, "embeddings", "get_input_embeddings() returns it")
        if head is not None and head not in self.named:
            self._add_outer(head, "lm_head.proj", "get_output_embeddings() returns it")
        self.named = {name: self.named[name] for name in graph.modules if name in self.named}

    def around(self, name: str) -> str:
        """`name`, with the nearest module around that has a common name replaced by that."""
        place = innermost(name, self.named)
        return name if place is None else dotted(self.named[place].common, below(name, place))

    def _add_tree(self, names: dict[str, str], why: str) -> None:
        """Take over the names that a family's tree gives."""
        blocks = {name: common for name, common in names.items() if _is_block(common)}
        for name, common in names.items():
            home = blocks.get(innermost(name, blocks) or "", "")
            role = below(common, home) if home else _outer_role(common)
            self.named[name] = Named(common, home, role, why)

    def _causal(self, blocks: list[Block]) -> dict[str, bool]:
        """Stack -> whether its attentions say that they look at the past alone, where they say."""
        causal: dict[str, bool] = {}
        for block in blocks:
            for name, site in block.sites.items():
                if site.role == "attn":
                    said = getattr(self.graph.modules[name], "is_causal", None)
                    if isinstance(said, bool):
                        causal.setdefault(_stack_of(block.place), said)
        return causal

    def _add_block(self, block: Block, causal: dict[str, bool]) -> None:
        """Name an inferred block and what has a role in it."""
        home = _stack_of(block.place)
        if home not in self._lists:
            self._lists[home] = self._name_list(home, block, causal.get(home))
        common = self._lists[home]
        if home != block.place:
            common = dotted(common, leaf_of(block.place))
            if not block.parts:
                self.named[block.place] = Named(common, common, "", block.why)
        for name, site in block.sites.items():
            self.named[name] = Named(dotted(common, site.role), common, site.role, site.why)

    def _name_list(self, home: str, block: Block, causal: bool | None) -> str:
        """Name a list of blocks and the norms beside it; the common name of the list."""
        outer = parent_of(home)
        stack = self.around(outer)
        if home == block.place:  # an attention on its own
            return stack
        if causal is not None and {"encoder", "decoder"}.isdisjoint(path_words(home)):
            stack = dotted(stack, "decoder" if causal else "encoder")
        common = dotted(stack, "block")
        if common in self._lists.values():
            common = dotted(stack, leaf_of(home), "block")
        self.named[home] = Named(common, "", "", "the list of blocks")
        for child in self.graph.children[outer]:
            name = dotted(outer, child)
            of_embeddings = any(word.startswith("emb") for word in words(child))
            norm = name not in self.named and is_norm(name, self.graph.modules[name])
            if norm and not of_embeddings:
                why = "a norm beside the list of blocks"
                self.named[name] = Named(dotted(stack, "layer_norm"), "", "layer_norm", why)
        return common

    def _add_outer(self, name: str, role: str, why: str) -> None:
        """Name a module outside all blocks; `name` may sit in one that is called after its role."""
        outer = parent_of(name)
        if any(word.startswith(("emb", "head", "pred")) for word in words(leaf_of(outer))):
            outer = parent_of(outer)
        common = dotted(self.around(outer), role)
        self.named[name] = Named(common, "", role, why)


def _outer_role(common: str) -> str:
    """The role in the common name of a module outside all blocks; empty for a mere container."""
    parts = common.split(".")
    starts = [n for n, part in enumerate(parts) if part in ("embeddings", "layer_norm", "lm_head")]
    return ".".join(parts[starts[0] :]) if starts else ""


def _is_block(common: str) -> bool:
    return leaf_of(common).isdigit()


def _stack_of(block: str) -> str:
    """The list that a block is in; an attention on its own is its own stack."""
    return parent_of(block) if leaf_of(block).isdigit() else block
