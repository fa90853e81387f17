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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from opendelta.addressing.graph import (
    Graph,
    ancestors,
    below,
    inside,
    is_depthwise,
    join,
    leaf_of,
    parent_of,
    words,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Projections fused in one module, and the roles that it plays.
FUSED = {
    "qkv": ("q", "k", "v"),
    "kv": ("k", "v"),
    "qk": ("q", "k"),
    "qv": ("q", "v"),
    "w13": ("w1", "w3"),
}

_LETTERS = {
    **dict.fromkeys(("q", "query", "queries", "wq", "receptance"), "q"),
    **dict.fromkeys(("k", "key", "keys", "wk"), "k"),
    **dict.fromkeys(("v", "value", "values", "wv"), "v"),
    **dict.fromkeys(("kv", "wkv"), "kv"),
    **dict.fromkeys(("qkv", "wqkv", "qkvz"), "qkv"),
    "qk": "qk",
}
# Words that say that "q", "key" ... mean something other than a projection of the hidden state.
_NOT_PROJECTION = _words(
    "pos position positional rel relative gate norm conv sconv global layout router"
)
# What holds such layers without being an attention, or sits inside one for another purpose.
_NOT_ATTENTION = _words("indexer compressor router ffn ff mlp feed")
_PLAIN = _words("linear proj projection dense layer fc c weight conv convolution")
_OUT = _words("o out output wo post final")
_FEED_FORWARD = _words(
    "mlp mlps ffn ffns ff ffw feed forward moe experts expert intermediate inter fc"
)
_DOWN = _words("down out output wo reduce")
_UP = _words("up gate in input intermediate inter wi expand")
_SIDE_BRANCH = _words("shortcut downsample se squeeze excite excitation")
_NOT_MIXER = _SIDE_BRANCH | _FEED_FORWARD
# Small networks in a block that compute something other than the next hidden state.
_NOT_FEED_FORWARD = _words("pos position positional rel relative router") | _SIDE_BRANCH


@dataclass
class Site:
    """The role that a module has in its block, and why."""

    role: str
    why: str


@dataclass
class Block:
    """One layer of a stack.

    Attributes:
        place: the element of the list (of the first of the lists, where several are joined).
        parts: the modules that it consists of, where `place` is not it: joined elements, or an
            element that is itself the attention.
        why: why it is taken for a block.
        sites: roles by module name.
    """

    place: str
    parts: tuple[str, ...]
    why: str
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def members(self) -> tuple[str, ...]:
        return self.parts or (self.place,)

    def words_of(self, name: str) -> list[str]:
        """The words of the path to a module inside; where lists are joined, of their names too."""
        start = next((member for member in self.members if inside(name, member)), self.place)
        if not leaf_of(start).isdigit():
            start = parent_of(start)
        elif self.parts:
            start = parent_of(parent_of(start))
        return [word for part in below(name, start).split(".") for word in words(part)]


@dataclass
class _Attention:
    """An attention: its holder, and its projections with their letters (q, k, v, kv, qkv)."""

    holder: str
    projections: Mapping[str, str]


def letters_of(part: str) -> str:
    """Which of q, k and v the name `part` says that a layer computes: ``""``, ``"q"``, ``"kv"``."""
    found = words(part)
    said = "".join(_LETTERS.get(word, "") for word in found)
    if not said or not _NOT_PROJECTION.isdisjoint(found):
        return ""
    return "".join(letter for letter in "qkv" if letter in said)


def find_blocks(graph: Graph, named: set[str]) -> list[Block]:
    """The blocks of a backbone with the roles of their modules, in module order.

    Args:
        graph: the backbone.
        named: blocks that got their names elsewhere; nothing inside them is looked at.
    """
    experts = _fused_experts(graph)
    attentions = [a for a in _attentions(graph) if not _within(a.holder, named)]
    blocks: dict[str, Block] = {}
    inhabitants: dict[str, list[_Attention]] = defaultdict(list)
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
    beside = [join(home, child) for home in homes for child in graph.children[home]]
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


def _within(name: str, places: set[str]) -> bool:
    return name in places or any(place in places for place in ancestors(name))


# --- attentions -----------------------------------------------------------------------------------


def _attentions(graph: Graph) -> list[_Attention]:
    """Every module that holds projections of q and v, or computes them by itself."""
    held: dict[str, dict[str, str]] = defaultdict(dict)
    for linear in graph.linears:
        part, holder = leaf_of(linear), parent_of(linear)
        letters = letters_of(part)
        if not letters and all(word in _PLAIN or word.isdigit() for word in words(part)):
            letters, holder = letters_of(leaf_of(holder)), parent_of(holder)
        if letters:
            held[holder][linear] = letters
    for name, module in graph.modules.items():
        if name in held or not _says_attention(name):
            continue
        fused = _nameless_fusion(graph, name)
        own = [
            p for p, value in module._parameters.items() if value is not None and value.dim() > 1
        ]
        raw = {letters_of(parameter) for parameter in own}
        if isinstance(module, nn.MultiheadAttention) or {"q", "v"} <= raw:
            held[name] = {}
        elif fused:
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
    return any("attn" in word or "atten" in word or word == "att" for word in words(part))


def _nameless_fusion(graph: Graph, holder: str) -> str | None:
    """The layer of an attention without named projections that computes q, k and v at once."""
    direct = (join(holder, child) for child in graph.children[holder])
    widths = {linear: graph.linears[linear] for linear in direct if linear in graph.linears}
    for linear, (width_in, width_out) in widths.items():
        if width_out == 3 * width_in:
            return linear
    for linear, (width_in, width_out) in widths.items():
        if width_out > width_in and len(widths) > 1:  # grouped-query attention
            return linear
    return None


def _second_factors(projections: Mapping[str, str]) -> dict[str, str]:
    """`projections` without the first factors ("a") of low-rank chains that have a second ("b")."""
    seconds = {letters for linear, letters in projections.items() if "b" in words(leaf_of(linear))}
    return {
        linear: letters
        for linear, letters in projections.items()
        if "a" not in words(leaf_of(linear)) or letters not in seconds
    }


# --- blocks ---------------------------------------------------------------------------------------


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
            if (other := join(shelf, child, leaf_of(place))) in graph.modules
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
        if around[place] > 1 or not {"pool", "pooler", "head"}.isdisjoint(words(leaf_of(place))):
            break
        firsts = (join(parent_of(place), b, "0") for b in graph.children[parent_of(place)])
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


# --- the parts of one block -----------------------------------------------------------------------


def _name_block(
    graph: Graph,
    block: Block,
    attentions: Sequence[_Attention],
    everything: set[str],
    experts: Sequence[str],
) -> None:
    """Fill in `block.sites`, the norms apart. `everything`: the members of all blocks."""
    free = {  # in module order; a dict, for want of an ordered set
        linear: None
        for member in block.members
        for linear in (*([member] if member in graph.linears else []), *graph.linears_below(member))
        if _innermost(linear, everything) == member
    }
    for attention in attentions:
        for linear in attention.projections:
            free.pop(linear, None)
    holders = [attention.holder for attention in attentions]
    for attention in attentions:
        _name_attention(graph, block, attention, holders, free)
    if not attentions:
        _name_mixer(graph, block, free)
    hidden = _hidden_width(graph, block)
    chains: list[tuple[str, dict[str, Site]]] = []
    for member in block.members:
        _find_chains(graph, member, hidden, free, chains)
    _name_feed_forward(block, chains)
    for place in experts:
        owner = next((a for a in ancestors(place) if a in block.sites), None)
        attending = owner is not None and block.sites[owner].role != "ff"
        if _innermost(place, everything) in block.members and not attending:
            block.sites.setdefault(place, Site("ff", "experts fused in 3-D parameters"))


def _innermost(name: str, places: set[str]) -> str | None:
    return next((place for place in (name, *ancestors(name)) if place in places), None)


def _name_attention(
    graph: Graph,
    block: Block,
    attention: _Attention,
    holders: Sequence[str],
    free: dict[str, None],
) -> None:
    """Give an attention, its projections and its output projections their roles."""
    root = attention.holder
    opaque = isinstance(graph.modules[root], nn.MultiheadAttention)
    outputs: list[str] = []
    while not opaque:
        outputs = _output_projections(graph, root, free)
        outer = parent_of(root)
        shared = any(inside(holder, outer) for holder in holders if holder != attention.holder)
        ends = root in block.members or outer in block.members
        if outputs or ends or shared or graph.is_element(root):
            break
        root = outer
    if not outputs:
        root = attention.holder
        outputs = [] if opaque else _output_beside(graph, attention, free)
    role = "crossattn" if _looks_elsewhere(block.words_of(root)) else "attn"
    if root != block.place or block.parts:
        said = ", ".join(sorted(set("".join(attention.projections.values())), key="qkv".index))
        why = f"holds {said}" if said else "computes q, k and v with its own parameters"
        block.sites[root] = Site(role, why)
        for linear in graph.linears_below(root):  # gates, biases ... are nobody else's either
            path = below(linear, root).split(".")
            if _FEED_FORWARD.isdisjoint(word for part in path for word in words(part)):
                free.pop(linear, None)
    for linear, letters in attention.projections.items():
        width_in, width_out = graph.linears[linear]
        named = letters_of(leaf_of(linear)) or letters_of(leaf_of(parent_of(linear)))
        why = "by its name" if named else f"{width_in} to {width_out} in an attention"
        block.sites[linear] = Site(f"{role}.{letters}", why)
    for linear in outputs:
        free.pop(linear, None)
        block.sites[linear] = Site(f"{role}.proj", "the attention's output projection")


def _looks_elsewhere(path: Sequence[str]) -> bool:
    """Whether the words of an attention's name say that its keys come from another sequence."""
    return any("cross" in word for word in path) or not {"enc", "encoder", "src"}.isdisjoint(path)


def _output_projections(graph: Graph, place: str, free: Mapping[str, None]) -> list[str]:
    """Output projections among the free linear layers inside an attention: usually one."""
    candidates = []
    for linear in graph.linears_below(place):
        around = {word for part in below(linear, place).split(".")[:-1] for word in words(part)}
        own = set(words(leaf_of(linear)))
        if linear in free and not (own | around) & _NOT_PROJECTION and not around & _NOT_ATTENTION:
            candidates.append(linear)
    named = [c for c in candidates if not _OUT.isdisjoint(_own_words(c))]
    seconds = [c for c in named if "a" not in words(leaf_of(c))]
    plain = [c for c in candidates if _PLAIN.issuperset(words(leaf_of(c)))]
    return seconds or named or plain[-1:]


def _output_beside(graph: Graph, attention: _Attention, free: Mapping[str, None]) -> list[str]:
    """An output projection that stands beside the module that holds q, k and v."""
    place = parent_of(attention.holder)
    widths = {graph.linears[linear][0] for linear in attention.projections}
    return [
        linear
        for child in graph.children[place]
        if (linear := join(place, child)) in free
        and not {"o", "out", "output", "proj"}.isdisjoint(words(child))
        and _FEED_FORWARD.isdisjoint(words(child))
        and _DOWN.isdisjoint(set(words(child)) - {"out", "output"})
        and graph.linears[linear][1] in widths
    ][:1]


def _own_words(linear: str) -> tuple[str, ...]:
    """The words of a layer's name, and of its wrapper's where its own says nothing."""
    own = words(leaf_of(linear))
    if all(word in _PLAIN or word.isdigit() for word in own):
        return own + words(leaf_of(parent_of(linear)))
    return own


def _hidden_width(graph: Graph, block: Block) -> int | None:
    """The width of the block's residual stream, where its attention or mixer tells."""
    for end in (1, 0):
        for linear, site in block.sites.items():
            if linear in graph.linears and site.role.endswith(".proj") == bool(end):
                return graph.linears[linear][end]
    return None


def _name_mixer(graph: Graph, block: Block, free: dict[str, None]) -> None:
    """Input and output projection of a block that mixes positions without attention."""
    for place in (join(member, c) for member in block.members for c in graph.children[member]):
        linears = [linear for linear in graph.linears_below(place) if linear in free]
        first = [c for c in linears if not {"in", "input"}.isdisjoint(words(leaf_of(c)))]
        last = [c for c in linears if not {"out", "output"}.isdisjoint(words(leaf_of(c)))]
        if last and len(linears) >= 2 and _FEED_FORWARD.isdisjoint(words(leaf_of(place))):
            block.sites[place] = Site("attn", "mixes positions in the place of an attention")
            first = [c for c in first or linears if c not in last]
            for linear in linears:
                free.pop(linear)
            break
    else:
        inner = (name for member in block.members for name in graph.inside_of(member))
        if not any(hasattr(graph.modules[name], "kernel_size") for name in inner):
            return
        linears = [
            linear for linear in free if _NOT_MIXER.isdisjoint(block.words_of(parent_of(linear)))
        ]
        first, last = linears[:1], linears[1:][-1:]
        for linear in linears:
            free.pop(linear)
    for linear in first[:1]:
        block.sites[linear] = Site("attn.qkv", "the mixer's input projection")
    for linear in last[-1:]:
        block.sites[linear] = Site("attn.proj", "the mixer's output projection")


# --- feed-forward ---------------------------------------------------------------------------------


def _find_chains(
    graph: Graph,
    place: str,
    hidden: int | None,
    free: dict[str, None],
    chains: list[tuple[str, dict[str, Site]]],
) -> None:
    """Take the layers of feed-forwards inside `place` from `free`, the innermost first."""
    said = words(leaf_of(place))
    children = [join(place, child) for child in graph.children[place]]
    aside = any("norm" in word for word in said) or not _NOT_FEED_FORWARD.isdisjoint(said)
    for child in children:
        if not aside and child not in graph.linears and graph.linears_below(child):
            _find_chains(graph, child, hidden, free, chains)
    if aside or any(is_depthwise(graph.modules[child]) for child in children):
        for linear in graph.linears_below(place):
            free.pop(linear, None)
    for chain in _chains(graph, [c for c in graph.linears_below(place) if c in free], hidden):
        chains.append((place, chain))
        for linear in chain:
            free.pop(linear)


def _chains(graph: Graph, linears: Sequence[str], hidden: int | None) -> list[dict[str, Site]]:
    """Groups of layers that lead from the hidden width to an inner one and back."""
    downs = [linear for linear in linears if _is_down(graph, linear, linears, hidden)]
    groups: list[list[str]] = [[]]
    for linear in linears:
        groups[-1].append(linear)
        if linear in downs[:-1]:
            groups.append([])
    found = []
    for group in groups:
        down = next((linear for linear in group if linear in downs), None)
        if down is None:
            continue
        inner, width = graph.linears[down]
        ups = [
            linear
            for linear in group
            if linear != down
            and graph.linears[linear][1] in (inner, 2 * inner)
            and (
                graph.linears[linear][0] == width
                or len(group) == 2
                or not _UP.isdisjoint(_own_words(linear))
            )
        ]
        if ups and group.index(ups[0]) < group.index(down):
            sites = {down: Site("ff.w2", f"{inner} to {width}: back to the hidden width")}
            found.append(sites | _ups(graph, ups, inner))
    return found


def _ups(graph: Graph, ups: Sequence[str], inner: int) -> dict[str, Site]:
    """Roles of the layers that lead to the inner width: one, or a gate and its partner."""
    gates = [linear for linear in ups if "gate" in words(leaf_of(linear))] or ups[:1]
    sites = {}
    for linear in ups:
        width_in, width_out = graph.linears[linear]
        if width_out == 2 * inner:
            role, kind = "w13", "gate and up at once"
        elif linear not in gates:
            role, kind = "w3", "up, beside a gate"
        else:
            role, kind = "w1", "gate" if len(ups) > 1 else "up"
        sites[linear] = Site(f"ff.{role}", f"{width_in} to {width_out}: {kind}")
    return sites


def _is_down(graph: Graph, linear: str, linears: Sequence[str], hidden: int | None) -> bool:
    """Whether a layer leads back to the hidden width. Its name beats its shape."""
    pair = [c for c in linears if parent_of(c) == parent_of(linear)]
    if len(pair) == 2 and len({c.rstrip("0123456789") for c in pair}) == 1:
        first, second = sorted(pair)
        if graph.linears[first][1] in (graph.linears[second][0], 2 * graph.linears[second][0]):
            return linear == second  # fc1 and fc2, and the like
    own = set(_own_words(linear))
    if not own & _UP and own & _DOWN:
        return True
    if own & _UP and not own & _DOWN:
        return False
    width_in, width_out = graph.linears[linear]
    if hidden is not None and width_out != width_in and hidden in (width_in, width_out):
        return width_out == hidden
    return linear == linears[-1]


def _name_feed_forward(block: Block, chains: Sequence[tuple[str, dict[str, Site]]]) -> None:
    """Give feed-forwards their roles; where some are called so, only they are."""
    called = [
        any(not _FEED_FORWARD.isdisjoint(block.words_of(linear)) for linear in chain)
        for _, chain in chains
    ]
    for (place, chain), said in zip(chains, called, strict=True):
        if any(called) and not said:
            continue
        block.sites.update(chain)
        if place not in block.members or block.parts:
            block.sites.setdefault(place, Site("ff", "holds a feed-forward"))
            continue
        for home in map(parent_of, chain):  # as in BERT: one part each for the way up and down
            if home not in block.members:
                block.sites.setdefault(home, Site("ff", "holds a part of a feed-forward"))


def _fused_experts(graph: Graph) -> list[str]:
    """Modules whose parameters, or those of their leaves, stack experts in three dimensions."""
    stacks: dict[str, list[int]] = defaultdict(list)
    for name, module in graph.modules.items():
        sizes = [p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3]
        if sizes and not hasattr(module, "kernel_size"):
            stacks[name] += sizes
            if not graph.children[name]:
                stacks[parent_of(name)] += sizes
    return [
        name
        for name, sizes in stacks.items()
        if len(sizes) >= 2
        and len(set(sizes)) == 1
        and sizes[0] > 1
        and not _FEED_FORWARD.isdisjoint(
            (*words(leaf_of(name)), *words(type(graph.modules[name]).__name__))
        )
    ]


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
            home = next((place for place in ancestors(name) if place in of), name)
            block = of.get(home)
            if block is None or name in block.sites:
                continue
            owner = next((place for place in ancestors(name) if place in block.sites), "")
            part = block.sites[owner].role if inside(owner, home) and owner else ""
            if not part or not letters_of(leaf_of(name).replace("norm", "")):
                block.sites[name] = Site(join(part, "layer_norm"), "a norm")
