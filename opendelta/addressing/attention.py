"""Attentions, and mixers in the place of one: which they are, and the roles of their parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from opendelta.addressing.graph import Graph
from opendelta.addressing.roles import (
    DOWN,
    FEED_FORWARD,
    NOT_ATTENTION,
    NOT_MIXER,
    NOT_PROJECTION,
    OUT,
    PLAIN,
    Block,
    Site,
    letters_of,
    own_words,
    says,
)
from opendelta.ground.names import below, dotted, inside, leaf_of, parent_of, path_words, words


@dataclass
class Attention:
    """An attention: its holder, and its projections with their letters (q, k, v, kv, qkv)."""

    holder: str
    projections: Mapping[str, str]


def find_attentions(graph: Graph) -> list[Attention]:
    """Every module that holds projections of q and v, or computes them by itself."""
    held: dict[str, dict[str, str]] = defaultdict(dict)
    for linear in graph.linears:
        part, holder = leaf_of(linear), parent_of(linear)
        letters = letters_of(part)
        if not letters and all(word in PLAIN or word.isdigit() for word in words(part)):
            letters, holder = letters_of(leaf_of(holder)), parent_of(holder)
        if letters:
            held[holder][linear] = letters
    for name, module in graph.modules.items():
        if name in held or not _says_attention(name):
            continue
        fused = _nameless_fusion(graph, name)
        matrices = (n for n, p in module._parameters.items() if p is not None and p.dim() > 1)
        raw = set(map(letters_of, matrices))
        if isinstance(module, nn.MultiheadAttention) or {"q", "v"} <= raw:
            held[name] = {}
        elif fused:
            held[name] = {fused: "qkv"}
    found = []
    for holder, projections in held.items():
        said = set("".join(projections.values()))
        enough = {"q", "v"} <= said or (_says_attention(holder) and said != {"k"})
        if enough and not says(holder, NOT_ATTENTION):
            found.append(Attention(holder, _second_factors(projections)))
    return found


def _says_attention(name: str) -> bool:
    part = leaf_of(name)
    if part.isdigit() or part == "self":
        part = leaf_of(parent_of(name))
    return any("attn" in word or "atten" in word or word == "att" for word in words(part))


def _nameless_fusion(graph: Graph, holder: str) -> str | None:
    """The layer of an attention without named projections that computes q, k and v at once."""
    direct = (dotted(holder, child) for child in graph.children[holder])
    widths = {linear: graph.linears[linear] for linear in direct if linear in graph.linears}
    fused = [linear for linear, (inner, outer) in widths.items() if outer == 3 * inner]
    if not fused and len(widths) > 1:  # grouped-query attention
        fused = [linear for linear, (inner, outer) in widths.items() if outer > inner]
    return fused[0] if fused else None


def _second_factors(projections: Mapping[str, str]) -> dict[str, str]:
    """`projections` without the first factors ("a") of low-rank chains that have a second ("b")."""
    seconds = {letters for linear, letters in projections.items() if says(linear, {"b"})}
    return {
        linear: letters
        for linear, letters in projections.items()
        if letters not in seconds or not says(linear, {"a"})
    }


def name_attention(
    graph: Graph,
    block: Block,
    attention: Attention,
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
            if FEED_FORWARD.isdisjoint(path_words(below(linear, root))):
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
        around = set(path_words(parent_of(below(linear, place))))
        own = set(words(leaf_of(linear)))
        if linear in free and not (own | around) & NOT_PROJECTION and not around & NOT_ATTENTION:
            candidates.append(linear)
    named = [c for c in candidates if not OUT.isdisjoint(own_words(c))]
    seconds = [c for c in named if not says(c, {"a"})]
    plain = [c for c in candidates if PLAIN.issuperset(words(leaf_of(c)))]
    return seconds or named or plain[-1:]


def _output_beside(graph: Graph, attention: Attention, free: Mapping[str, None]) -> list[str]:
    """An output projection that stands beside the module that holds q, k and v."""
    place = parent_of(attention.holder)
    widths = {graph.linears[linear][0] for linear in attention.projections}
    return [
        linear
        for child in graph.children[place]
        if (linear := dotted(place, child)) in free
        and says(child, {"o", "out", "output", "proj"})
        and not says(child, FEED_FORWARD)
        and DOWN.isdisjoint(set(words(child)) - {"out", "output"})
        and graph.linears[linear][1] in widths
    ][:1]


def name_mixer(graph: Graph, block: Block, free: dict[str, None]) -> None:
    """Input and output projection of a block that mixes positions without attention."""
    for place in (dotted(member, c) for member in block.members for c in graph.children[member]):
        linears = [linear for linear in graph.linears_below(place) if linear in free]
        first = [c for c in linears if says(c, {"in", "input"})]
        last = [c for c in linears if says(c, {"out", "output"})]
        if last and len(linears) >= 2 and not says(place, FEED_FORWARD):
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
            linear for linear in free if NOT_MIXER.isdisjoint(block.words_of(parent_of(linear)))
        ]
        first, last = linears[:1], linears[1:][-1:]
        for linear in linears:
            free.pop(linear)
    for linear in first[:1]:
        block.sites[linear] = Site("attn.qkv", "the mixer's input projection")
    for linear in last[-1:]:
        block.sites[linear] = Site("attn.proj", "the mixer's output projection")
