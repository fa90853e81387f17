"""Roles of modules, read off the shape and the part names of any backbone. No model is named here.

The rules, in order:

1. A linear layer whose name says q, k, v, or a fusion of them is a *projection*. The module that
   holds projections of q and v is an *attention*. In a low-rank chain the second factor counts; in
   a module called attention a nameless layer three times as wide as its input is q, k and v.
2. A *block* is the innermost element of a list that holds an attention and at least two other
   linear layers (so T5's sublayers, Swin's stages and ALBERT's shared layers come out right).
   Lists that run in parallel (attentions, feed-forwards, norms, as in XLM) are joined by index.
3. The attention's output projection is the linear layer beside its projections. What encloses
   them is `attn`, or `crossattn` if its name says that it looks elsewhere.
4. Of the block's other linear layers, those that lead from the hidden width to an inner one and
   back are a *feed-forward*: up `w1`, down `w2`; where it is gated, gate `w1` and up `w3`. Experts
   that are fused in 3-D parameters are one `ff`.
5. An element beside blocks, or of any list in a backbone without attention, is a block too. If it
   has a *mixer* (state space, convolution), that has an input projection, which does the work of
   q, k and v, and an output projection.
6. Norms of a block are `layer_norm`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from torch import nn

from opendelta.addressing.attention import Attention, find_attentions, name_attention, name_mixer
from opendelta.addressing.feed_forward import find_chains, fused_experts, name_feed_forward
from opendelta.addressing.graph import Graph
from opendelta.addressing.roles import Block, Site, letters_of, says
from opendelta.ground.names import ancestors, dotted, innermost, inside, leaf_of, parent_of, words


def find_blocks(graph: Graph, named: set[str]) -> list[Block]:
    """The blocks of a backbone with the roles of their modules, in module order.

    Args:
        graph: the backbone.
        named: blocks that got their names elsewhere; nothing inside them is looked at.
    """
    experts = fused_experts(graph)
    attentions = [a for a in find_attentions(graph) if innermost(a.holder, named) is None]
    blocks: dict[str, Block] = {}
    inhabitants: dict[str, list[Attention]] = defaultdict(list)
    around = Counter(place for a in attentions for place in (a.holder, *ancestors(a.holder)))
    projections = {linear for a in attentions for linear in a.projections}
    for attention in attentions:
        block = _block_around(graph, attention.holder, projections, around, experts)
        if block is not None:
            blocks.setdefault(block.place, block)
            inhabitants[block.place].append(attention)
    taken = {member for block in blocks.values() for member in block.members} | named
    outer = {place for name in taken for place in ancestors(name)}
    homes = dict.fromkeys(parent_of(name) for name in taken)
    beside = [dotted(home, child) for home in homes for child in graph.children[home]]
    for place in beside if taken else _elements(graph):
        if place in taken or place in outer or not graph.is_element(place):
            continue
        if place in graph.linears or graph.linears_below(place):
            blocks[place] = Block(place, (), "an element of a list of blocks")
    everything = {member for block in blocks.values() for member in block.members}
    for place, block in blocks.items():
        _name_block(graph, block, inhabitants[place], everything, experts)
    _name_norms(graph, blocks.values())
    order = {name: number for number, name in enumerate(graph.modules)}
    return sorted((b for b in blocks.values() if b.sites), key=lambda block: order[block.place])


def _block_around(
    graph: Graph, holder: str, projections: set[str], around: Counter[str], experts: Sequence[str]
) -> Block | None:
    """The block of the attention in `holder`, or None where it is in no list.

    Args:
        graph: the backbone.
        holder: the module that holds the projections.
        projections: those of all attentions.
        around: how many attentions each module holds.
        experts: the modules that hold fused experts.
    """
    elements = [place for place in (holder, *ancestors(holder)) if graph.is_element(place)]
    for place in elements:
        others = sum(1 for linear in graph.linears_below(place) if linear not in projections)
        if place != holder and (others >= 2 or any(inside(e, place) for e in experts)):
            return Block(place, (), "a list element with attention and other linear layers")
    for place in elements:
        home, shelf = parent_of(place), parent_of(parent_of(place))
        joined = [
            other
            for child in graph.children[shelf]
            if (other := dotted(shelf, child, leaf_of(place))) in graph.modules
            and graph.is_element(other)
            and len(graph.children[parent_of(other)]) == len(graph.children[home])
            and (other == place or other not in around)
        ]
        if any(other in graph.linears or graph.linears_below(other) for other in joined[1:]):
            return Block(place, tuple(joined), "elements of parallel lists")
    if elements:
        parts = (holder,) if elements[0] == holder else ()
        return Block(elements[0], parts, "a list element with attention")
    for place in (holder, *ancestors(holder)):
        if around[place] > 1 or says(place, {"pool", "pooler", "head"}):
            break
        firsts = (dotted(parent_of(place), b, "0") for b in graph.children[parent_of(place)])
        if any(around[first] and graph.is_element(first) for first in firsts):
            parts = (place,) if place == holder else ()
            return Block(place, parts, "an attention beside the list of blocks")
    return None


def _elements(graph: Graph) -> list[str]:
    """The innermost list elements with two linear layers, else one, for want of attention."""
    for least in (2, 1):
        found: list[str] = []
        outer: set[str] = set()
        for name in reversed(graph.modules):  # children before parents
            count = len(graph.linears_below(name)) + (name in graph.linears)
            if count >= least and name not in outer and graph.is_element(name):
                found.append(name)
                outer.update(ancestors(name))
        if found:
            return found
    return []


def _name_block(
    graph: Graph,
    block: Block,
    attentions: Sequence[Attention],
    everything: set[str],
    experts: Sequence[str],
) -> None:
    """Fill in `block.sites`, the norms apart. `everything`: the members of all blocks."""
    free = {  # in module order; a dict, for want of an ordered set
        linear: None
        for member in block.members
        for linear in (*([member] if member in graph.linears else []), *graph.linears_below(member))
        if innermost(linear, everything) == member
    }
    for attention in attentions:
        for linear in attention.projections:
            free.pop(linear, None)
    holders = [attention.holder for attention in attentions]
    for attention in attentions:
        name_attention(graph, block, attention, holders, free)
    if not attentions:
        name_mixer(graph, block, free)
    hidden = hidden_width(graph, block)
    chains: list[tuple[str, dict[str, Site]]] = []
    for member in block.members:
        find_chains(graph, member, hidden, free, chains)
    name_feed_forward(block, chains)
    for place in experts:
        owner = innermost(parent_of(place), block.sites)
        attending = owner is not None and block.sites[owner].role != "ff"
        if innermost(place, everything) in block.members and not attending:
            block.sites.setdefault(place, Site("ff", "experts fused in 3-D parameters"))


def hidden_width(graph: Graph, block: Block) -> int | None:
    """The width of the block's residual stream, where its attention or mixer tells."""
    for end in (1, 0):
        for linear, site in block.sites.items():
            if linear in graph.linears and site.role.endswith(".proj") == bool(end):
                return graph.linears[linear][end]
    return None


# --- norms ----------------------------------------------------------------------------------------


def is_norm(name: str, module: nn.Module) -> bool:
    """Whether a module normalises: named so, and scaling each feature by itself."""
    parameters = [p for p in module._parameters.values() if p is not None]
    if not parameters or any(p.dim() != 1 for p in parameters):
        return False
    said = (*words(leaf_of(name)), *words(type(module).__name__))
    return any("norm" in word or word == "ln" for word in said)


def _name_norms(graph: Graph, blocks: Iterable[Block]) -> None:
    """Name the norms of all blocks; those of queries and keys belong to their attention."""
    of = {member: block for block in blocks for member in block.members}
    for name, module in graph.modules.items():
        if module._parameters and is_norm(name, module):
            home = innermost(parent_of(name), of) or name
            block = of.get(home)
            if block is None or name in block.sites:
                continue
            owner = innermost(parent_of(name), block.sites)
            part = block.sites[owner].role if owner and inside(owner, home) else ""
            if not part or not letters_of(leaf_of(name).replace("norm", "")):
                block.sites[name] = Site(dotted(part, "layer_norm"), "a norm")
