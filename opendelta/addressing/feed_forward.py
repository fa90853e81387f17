"""Feed-forwards: layers that lead from the hidden width to an inner one and back, and experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from opendelta.addressing.graph import Graph, is_depthwise
from opendelta.addressing.roles import (
    DOWN,
    FEED_FORWARD,
    NOT_FEED_FORWARD,
    UP,
    Block,
    Site,
    own_words,
    says,
)
from opendelta.ground.names import dotted, leaf_of, parent_of, words


def find_chains(
    graph: Graph,
    place: str,
    hidden: int | None,
    free: dict[str, None],
    chains: list[tuple[str, dict[str, Site]]],
) -> None:
    """Take the layers of feed-forwards inside `place` from `free`, the innermost first."""
    said = words(leaf_of(place))
    children = [dotted(place, child) for child in graph.children[place]]
    aside = any("norm" in word for word in said) or not NOT_FEED_FORWARD.isdisjoint(said)
    for child in children:
        if not aside and child not in graph.linears and graph.linears_below(child):
            find_chains(graph, child, hidden, free, chains)
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
                or not UP.isdisjoint(own_words(linear))
            )
        ]
        if ups and group.index(ups[0]) < group.index(down):
            sites = {down: Site("ff.w2", f"{inner} to {width}: back to the hidden width")}
            found.append(sites | _ups(graph, ups, inner))
    return found


def _ups(graph: Graph, ups: Sequence[str], inner: int) -> dict[str, Site]:
    """Roles of the layers that lead to the inner width: one, or a gate and its partner."""
    gates = [linear for linear in ups if says(linear, {"gate"})] or ups[:1]
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
    own = set(own_words(linear))
    if bool(own & UP) != bool(own & DOWN):
        return bool(own & DOWN)
    width_in, width_out = graph.linears[linear]
    if hidden is not None and width_out != width_in and hidden in (width_in, width_out):
        return width_out == hidden
    return linear == linears[-1]


def name_feed_forward(block: Block, chains: Sequence[tuple[str, dict[str, Site]]]) -> None:
    """Give feed-forwards their roles; where some are called so, only they are."""
    called = [
        (place, chain)
        for place, chain in chains
        if any(not FEED_FORWARD.isdisjoint(block.words_of(linear)) for linear in chain)
    ]
    for place, chain in called or chains:
        block.sites.update(chain)
        if place not in block.members or block.parts:
            block.sites.setdefault(place, Site("ff", "holds a feed-forward"))
            continue
        for home in map(parent_of, chain):  # as in BERT: one part each for the way up and down
            if home not in block.members:
                block.sites.setdefault(home, Site("ff", "holds a part of a feed-forward"))


def fused_experts(graph: Graph) -> list[str]:
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
        and not FEED_FORWARD.isdisjoint(
            (*words(leaf_of(name)), *words(type(graph.modules[name]).__name__))
        )
    ]


def about_experts(module: nn.Module) -> str:
    """For an error about a module without linears: that its experts are the reason."""
    stacks = [p for p in module.parameters() if p.dim() == 3]
    if not stacks or hasattr(module, "kernel_size"):
        return ""
    return (
        f" Its {stacks[0].shape[0]} experts are fused in 3-D parameters, without linears or biases "
        "of their own: adapters go behind the whole (AdapterModel, ParallelAdapterModel)."
    )
