"""Roles of modules, read off the shape and the part names of any backbone. No model is named here.

The rules, in order:

1. A linear layer whose name says q, k, v, or a fusion of them is a *projection*. The module that
   holds projections of q and v is an *attention*. In a low-rank chain the second factor counts;
   in a module called attention a nameless layer three times as wide as its input is q, k and v.
2. A *block* is the innermost element of a list that holds an attention and at least two other
   linear layers (so T5's sublayers, Swin's stages and ALBERT's shared layers come out right).
   Lists that run in parallel (XLM's attentions, feed-forwards, norms) are joined by index.
3. The attention's output projection is the linear layer beside it; the module that encloses it
   and the projections is `attn`, or `crossattn` if its name says that it looks elsewhere.
4. Of the block's other linear layers, those that lead from the hidden width to another and back
   are a *feed-forward*: up `w1`, down `w2`; where it is gated, gate `w1` and up `w3`. Experts that
   are fused in 3-D parameters are one `ff`.
5. An element beside blocks, or of any list in a backbone without attention, is a block too. Its
   *mixer* (state space, convolution) has an input projection, which does the work of q, k and v,
   and an output projection.
6. Norms of a block are `layer_norm`; so are those beside the list of blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from opendelta.addressing.graph import Graph, ancestors, inside, join, leaf_of, parent_of, words

# Projections fused in one module, and the roles that it plays.
FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "qk": ("q", "k"), "qv": ("q", "v")}
FUSED["w13"] = ("w1", "w3")

_LETTERS = {
    **dict.fromkeys(("q", "query", "queries", "wq", "receptance"), "q"),
    **dict.fromkeys(("k", "key", "keys", "wk"), "k"),
    **dict.fromkeys(("v", "value", "values", "wv"), "v"),
    **dict.fromkeys(("kv", "wkv"), "kv"),
    **dict.fromkeys(("qkv", "wqkv", "qkvz"), "qkv"),
    "qk": "qk",
}
# A word that says that "q", "key" ... means something other than a projection of the hidden state.
_NOT_PROJECTION = frozenset(
    "pos position positional rel relative gate norm conv global layout router".split()
)
# Modules whose projections select positions rather than attend to them.
_NOT_ATTENTION = frozenset("indexer compressor router ffn ff mlp feed".split())
_PLAIN = frozenset("linear proj projection dense layer fc weight".split())
_OUT = frozenset("o out output wo proj projection dense post final".split())
_ELSEWHERE = frozenset("cross enc encoder src memory".split())
_FEED_FORWARD = frozenset("mlp ffn ff feed forward moe experts expert intermediate fc".split())
_DOWN = frozenset("down out output wo".split())
_UP = frozenset("up gate in intermediate wi".split())


@dataclass
class Site:
    """One module that has a role: its common name below its block, and why."""

    role: str
    why: str


@dataclass
class Block:
    """One layer of a stack.

    Attributes:
        place: the element of the list (of the first of the lists, where several are joined).
        members: the modules that make it up; usually `place` alone.
        sites: roles by module name.
    """

    place: str
    members: tuple[str, ...]
    why: str
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def has_attention(self) -> bool:
        return any(site.role.split(".")[0] in ("attn", "crossattn") for site in self.sites.values())


@dataclass
class _Attention:
    """An attention: its holder and its projections by letter (q, k, v, qkv, kv ...)."""

    holder: str
    projections: dict[str, str]  # linear -> letters


def letters_of(part: str) -> str:
    """Which of q, k and v the name `part` says that a layer computes: ``""``, ``"q"``, ``"kv"``."""
    found = words(part)
    if not _NOT_PROJECTION.isdisjoint(found):
        return ""
    said = "".join(_LETTERS.get(word, "") for word in found)
    return "".join(letter for letter in "qkv" if letter in said)


def find_blocks(graph: Graph, named: set[str]) -> list[Block]:
    """The blocks of a backbone with the roles of their modules.

    Args:
        graph: the backbone.
        named: blocks that have got their names elsewhere; nothing inside is looked at.
    """
    attentions = [a for a in _attentions(graph) if not _within(a.holder, named)]
    projections = {linear for a in attentions for linear in a.projections}
    blocks: dict[str, Block] = {}
    members: dict[str, list[_Attention]] = defaultdict(list)
    for attention in attentions:
        block = _block_around(graph, attention.holder, projections)
        if block is not None:
            members[block.place].append(attention)
            blocks.setdefault(block.place, block)
    lists = {parent_of(place) for place in blocks} | {parent_of(place) for place in named}
    if blocks or named:
        others = [join(home, child) for home in lists for child in graph.children[home]]
    else:
        others = _elements(graph)
    for place in others:
        if place not in blocks and not _within(place, named) and graph.is_element(place):
            if graph.linears_below(place) and not any(inside(b, place) for b in blocks):
                blocks[place] = Block(place, (place,), "an element beside the blocks")
    nested = {place for place in blocks if any(a in blocks for a in ancestors(place))}
    for place, block in blocks.items():
        deeper = [b for b in nested if b != place and inside(b, place)]
        _name_block(graph, block, members[place], deeper)
    order = {name: number for number, name in enumerate(graph.modules)}
    return sorted(
        (b for b in blocks.values() if b.sites), key=lambda block: order[block.place]
    )


# --- attentions -----------------------------------------------------------------------------------


def _attentions(graph: Graph) -> list[_Attention]:
    """Every module that holds projections of q and v, in module order."""
    held: dict[str, dict[str, str]] = defaultdict(dict)
    for linear in graph.linears:
        part, holder = leaf_of(linear), parent_of(linear)
        letters = letters_of(part)
        if not letters and all(word in _PLAIN or word.isdigit() for word in words(part)):
            letters, holder = letters_of(leaf_of(holder)), parent_of(holder)
        if letters:
            held[holder][linear] = letters
    for name, module in graph.modules.items():
        if name not in held and _says_attention(name):
            if isinstance(module, nn.MultiheadAttention):
                held[name] = {}
                continue
            fused = _nameless_fusion(graph, name)
            if fused:
                held[name] = {fused: "qkv"}
    found = []
    for holder, projections in held.items():
        said = set("".join(projections.values()))
        enough = {"q", "v"} <= said or (_says_attention(holder) and said != {"k"})
        if enough and _NOT_ATTENTION.isdisjoint(words(leaf_of(holder))):
            found.append(_Attention(holder, _second_factors(projections)))
    return found


def _says_attention(name: str) -> bool:
    part = leaf_of(name)
    if part.isdigit() or part == "self":
        part = leaf_of(parent_of(name))
    return any(word.startswith("att") or word in ("attn", "selfattn") for word in words(part))


def _nameless_fusion(graph: Graph, holder: str) -> str | None:
    """The layer of an attention without named projections that computes q, k and v at once."""
    direct = [linear for c in graph.children[holder] if (linear := join(holder, c)) in graph.linears]
    for linear in direct:
        width_in, width_out = graph.linears[linear]
        if width_out == 3 * width_in:
            return linear
    for linear in direct:
        width_in, width_out = graph.linears[linear]
        if width_out > width_in and len(direct) > 1:
            return linear
    return None


def _second_factors(projections: dict[str, str]) -> dict[str, str]:
    """`projections` without the first factors ("a") of low-rank chains whose second ("b") is there."""
    seconds = {letters for linear, letters in projections.items() if "b" in words(leaf_of(linear))}
    return {
        linear: letters
        for linear, letters in projections.items()
        if not ("a" in words(leaf_of(linear)) and letters in seconds)
    }


# --- blocks ---------------------------------------------------------------------------------------


def _block_around(graph: Graph, holder: str, projections: set[str]) -> Block | None:
    """The block that the attention in `holder` belongs to, or None outside every list."""
    elements = [place for place in (holder, *ancestors(holder)) if graph.is_element(place)]
    for place in elements:
        others = [linear for linear in graph.linears_below(place) if linear not in projections]
        if len(others) + 2 * len(_experts(graph, place)) >= 2:
            return Block(place, (place,), "a list element with attention and feed-forward")
    for place in elements:
        home = parent_of(place)
        beside = [
            other
            for child in graph.children[parent_of(home)]
            if graph.is_element(other := join(parent_of(home), child, leaf_of(place)))
            and len(graph.children[parent_of(other)]) == len(graph.children[home])
        ]
        if any(graph.linears_below(other) for other in beside if other != place):
            return Block(place, tuple(beside), "elements of parallel lists")
    return Block(elements[0], (elements[0],), "a list element with attention") if elements else None


def _elements(graph: Graph) -> list[str]:
    """The innermost list elements with two linear layers or more, for backbones without attention."""
    found: list[str] = []
    for name in reversed(list(graph.modules)):  # children before parents
        if graph.is_element(name) and len(graph.linears_below(name)) >= 2:
            if not any(inside(inner, name) for inner in found[-64:]):
                found.append(name)
    return found


def _within(name: str, places: set[str]) -> bool:
    return name in places or any(place in places for place in ancestors(name))


# --- the parts of one block -----------------------------------------------------------------------


def _name_block(
    graph: Graph, block: Block, attentions: Sequence[_Attention], deeper: Sequence[str]
) -> None:
    """Fill in `block.sites`. `deeper`: blocks inside this one, which speak for themselves."""
    free = {
        linear: None
        for member in block.members
        for linear in ([member] if member in graph.linears else graph.linears_below(member))
        if not any(inside(linear, place) for place in deeper)
    }
    taken = {linear for attention in attentions for linear in attention.projections}
    for linear in taken:
        free.pop(linear, None)
    holders = [attention.holder for attention in attentions]
    roots = []
    for attention in attentions:
        roots.append(_name_attention(graph, block, attention, holders, free))
    if not attentions:
        _name_mixer(graph, block, free)
    hidden = _hidden_width(graph, block)
    for member in block.members:
        _name_feed_forward(graph, block, member, hidden, free)
    for member in block.members:
        for place in _experts(graph, member):
            if not any(inside(place, root) for root in roots):
                block.sites.setdefault(place, Site("ff", "experts fused in 3-D parameters"))
    _name_norms(graph, block, hidden)


def _name_attention(
    graph: Graph,
    block: Block,
    attention: _Attention,
    holders: Sequence[str],
    free: dict[str, None],
) -> str:
    """Give an attention, its projections and its output projection their roles; its root."""
    place = attention.holder
    output = None
    while True:
        if not isinstance(graph.modules[place], nn.MultiheadAttention):
            output = _output_projection(graph, place, block, free)
        outer = parent_of(place)
        alone = not any(inside(holder, outer) for holder in holders if holder != attention.holder)
        if output or place in block.members or outer in block.members or not alone:
            break
        if not inside(outer, block.place) or graph.is_element(place):
            break
        place = outer
    if output is None and place not in block.members and parent_of(place) in block.members:
        output = _named_output(graph, parent_of(place), attention, free)
        place = place if output is None else attention.holder
    within = place[len(block.place) :] if inside(place, block.place) else place
    elsewhere = any(not _ELSEWHERE.isdisjoint(words(part)) for part in within.split("."))
    role = "crossattn" if elsewhere else "attn"
    if place not in block.members or len(block.members) > 1:
        said = sorted(set("".join(attention.projections.values())), key="qkv".index)
        why = f"holds {', '.join(said)}" if said else "an attention of torch"
        block.sites[place] = Site(role, why)
    for linear, letters in attention.projections.items():
        block.sites[linear] = Site(f"{role}.{letters}", _why_projection(graph, linear, letters))
    if output is not None:
        free.pop(output, None)
        block.sites[output] = Site(f"{role}.proj", "the attention's output projection")
    return place


def _why_projection(graph: Graph, linear: str, letters: str) -> str:
    if letters_of(leaf_of(linear)) or letters_of(leaf_of(parent_of(linear))):
        return "by its name"
    width_in, width_out = graph.linears[linear]
    return f"{width_in} to {width_out} in an attention"


def _output_projection(
    graph: Graph, place: str, block: Block, free: dict[str, None]
) -> str | None:
    """The output projection among the free linear layers inside `place`, by name, else the last."""
    if place in block.members and len(block.members) == 1:
        return None
    candidates = [
        linear
        for linear in graph.linears_below(place)
        if linear in free and _NOT_PROJECTION.isdisjoint(words(leaf_of(linear)))
    ]
    named = [c for c in candidates if not _OUT.isdisjoint(_own_words(c))]
    seconds = [c for c in named if "a" not in words(leaf_of(c))]
    return (seconds or named or [None])[-1]


def _named_output(
    graph: Graph, place: str, attention: _Attention, free: dict[str, None]
) -> str | None:
    """An output projection that stands beside its attention."""
    width = {graph.linears[linear][0] for linear in attention.projections}
    for child in graph.children[place]:
        linear = join(place, child)
        if linear in free and not {"o", "out", "output", "proj"}.isdisjoint(words(child)):
            if graph.linears[linear][1] in width and _DOWN_ONLY.isdisjoint(words(child)):
                return linear
    return None


_DOWN_ONLY = frozenset("ffn ff fc mlp down intermediate".split())


def _own_words(linear: str) -> tuple[str, ...]:
    """The words of a layer's name, or of its wrapper's where its own says nothing."""
    own = words(leaf_of(linear))
    if all(word in _PLAIN or word.isdigit() for word in own):
        return own + words(leaf_of(parent_of(linear)))
    return own


def _hidden_width(graph: Graph, block: Block) -> int | None:
    """The width of the block's residual stream, where its attention or mixer tells."""
    for linear, site in block.sites.items():
        if site.role.endswith(".proj") and linear in graph.linears:
            return graph.linears[linear][1]
    for linear, site in block.sites.items():
        if linear in graph.linears:
            return graph.linears[linear][0]
    return None


def _name_mixer(graph: Graph, block: Block, free: dict[str, None]) -> None:
    """Input and output projection of a block that mixes positions without attention."""
    mixers = [
        join(member, child)
        for member in block.members
        for child in graph.children[member]
        if _FEED_FORWARD.isdisjoint(words(child))
    ]
    for place in mixers:
        linears = [c for c in (place, *graph.linears_below(place)) if c in free]
        if len(linears) >= 2:
            break
    else:
        linears = [c for c in free if any(inside(c, place) for place in mixers)]
        place = block.place
    if not linears:
        return
    ins = [c for c in linears if not {"in", "input", "start"}.isdisjoint(words(leaf_of(c)))]
    outs = [c for c in linears if not {"out", "output", "end"}.isdisjoint(words(leaf_of(c)))]
    first = (ins or linears)[0]
    last = next((c for c in reversed(outs or linears) if c != first), None)
    if place not in block.members:
        block.sites[place] = Site("attn", "mixes positions in the place of an attention")
    block.sites[first] = Site("attn.qkv", "the mixer's input projection")
    free.pop(first)
    if last is not None:
        block.sites[last] = Site("attn.proj", "the mixer's output projection")
        free.pop(last)
    if place not in block.members:
        for linear in linears:
            free.pop(linear, None)


# --- feed-forward ---------------------------------------------------------------------------------


def _name_feed_forward(
    graph: Graph, block: Block, place: str, hidden: int | None, free: dict[str, None]
) -> None:
    """Find feed-forwards inside `place`, the innermost first, and take their layers from `free`."""
    if not any(linear in free for linear in (place, *graph.linears_below(place))):
        return
    for child in graph.children[place]:
        if join(place, child) not in graph.linears:
            _name_feed_forward(graph, block, join(place, child), hidden, free)
    chain = _chain(graph, [c for c in graph.linears_below(place) if c in free], hidden)
    for linear, (role, why) in chain.items():
        free.pop(linear)
        block.sites[linear] = Site(f"ff.{role}", why)
        home = parent_of(linear)
        if place in block.members and home not in block.members and home not in block.sites:
            block.sites[home] = Site("ff", "holds a part of the feed-forward")
    if chain and place not in block.members:
        block.sites[place] = Site("ff", "holds a feed-forward")
    elif chain and len(block.members) > 1:
        block.sites.setdefault(place, Site("ff", "holds a feed-forward"))


def _chain(
    graph: Graph, linears: Iterable[str], hidden: int | None
) -> dict[str, tuple[str, str]]:
    """Roles of the layers that lead from the hidden width to an inner one and back."""
    candidates = list(linears)
    downs = [c for c in candidates if _is_down(graph, c, candidates, hidden)]
    if not downs:
        return {}
    down = downs[-1]
    inner, width = graph.linears[down]
    ups = [
        c
        for c in candidates
        if c != down
        and c not in downs
        and graph.linears[c][0] == width
        and graph.linears[c][1] in (inner, 2 * inner)
    ]
    if not ups:
        return {}
    roles = {down: ("w2", f"{inner} to {width}: back to the hidden width")}
    gates = [c for c in ups if "gate" in words(leaf_of(c))] or ups[:1]
    for linear in ups:
        fused = graph.linears[linear][1] == 2 * inner
        role = "w13" if fused else "w1" if linear in gates else "w3"
        kind = {"w13": "gate and up at once", "w1": "up", "w3": "up, beside a gate"}[role]
        if role == "w1" and len(ups) > 1:
            kind = "gate"
        roles[linear] = (role, f"{width} to {graph.linears[linear][1]}: {kind}")
    return roles


def _is_down(graph: Graph, linear: str, candidates: Sequence[str], hidden: int | None) -> bool:
    """Whether a layer leads back to the hidden width. "Down" and "up" in a name beat the shape."""
    own = set(_own_words(linear))
    if "down" in own:
        return True
    if own & {"up", "gate"}:
        return False
    width_in, width_out = graph.linears[linear]
    if hidden is not None and width_out != width_in and hidden in (width_in, width_out):
        return width_out == hidden
    if own & _DOWN and not own & _UP:
        return True
    return linear == candidates[-1] and not own & _UP


def _experts(graph: Graph, place: str) -> list[str]:
    """Modules inside `place` whose parameters, or whose children's, stack experts in 3-D."""
    found = []
    for name in _below(graph, place):
        stacked = _stacked(graph.modules[name])
        for child in graph.children[name]:
            if not graph.children[join(name, child)]:
                stacked = stacked + _stacked(graph.modules[join(name, child)])
        if len(stacked) >= 2 and len(set(stacked)) == 1 and stacked[0] > 1:
            found.append(name)
    return found


def _below(graph: Graph, place: str) -> Iterable[str]:
    yield place
    for child in graph.children[place]:
        yield from _below(graph, join(place, child))


def _stacked(module: nn.Module) -> tuple[int, ...]:
    if hasattr(module, "kernel_size"):
        return ()
    return tuple(p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3)


# --- norms ----------------------------------------------------------------------------------------


def is_norm(name: str, module: nn.Module) -> bool:
    """Whether a module normalises: named so, and scaling each feature by itself."""
    parameters = [p for p in module._parameters.values() if p is not None]
    said = {*words(leaf_of(name)), *words(type(module).__name__)}
    named = any("norm" in word or word == "ln" for word in said)
    return named and bool(parameters) and all(p.dim() == 1 for p in parameters)


def _name_norms(graph: Graph, block: Block, hidden: int | None) -> None:
    for member in block.members:
        for name in _below(graph, member):
            if not is_norm(name, graph.modules[name]) or name in block.sites:
                continue
            home = next(
                (p for p in ancestors(name) if p in block.sites or p in block.members), block.place
            )
            if home in block.sites and letters_of(leaf_of(name).replace("norm", "")):
                continue  # of the queries or keys
            role = block.sites[home].role if home in block.sites else ""
            block.sites[name] = Site(join(role, "layer_norm"), "a norm")
