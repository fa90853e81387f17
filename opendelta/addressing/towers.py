"""Which part of a backbone a batch runs through: several towers, one of which takes the input.

A model that reads images and text has a tower for each. A text batch never reaches the vision
tower, so deltas put there by default would be dead weight. The default scope is therefore the
tower that holds the input embeddings; the others are addressed by name (``vision.attn.q``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from opendelta.addressing.graph import Graph, inside, join, leaf_of, words

_MODALITIES = {
    "vision": "vision vit visual image images img pixel pixels video",
    "audio": "audio speech acoustic sound wav mel",
    "text": "text language lm word",
}
_MODALITY = {word: name for name, said in _MODALITIES.items() for word in said.split()}
_GENERIC = frozenset("model tower encoder decoder module backbone net network transformer".split())
# Parts beside a stack of blocks that turn one modality into another, or code into signal.
_ADAPTING = frozenset(
    "resampler perceiver qformer projector projection connector aligner vocoder codec".split()
)


def input_embeddings(graph: Graph) -> str | None:
    """The name of the module that `get_input_embeddings()` of the outermost model returns."""
    return _asked(graph, "get_input_embeddings")


def output_embeddings(graph: Graph) -> str | None:
    """The name of the module that `get_output_embeddings()` of the outermost model returns."""
    return _asked(graph, "get_output_embeddings")


def _asked(graph: Graph, question: str) -> str | None:
    names = {id(module): name for name, module in graph.modules.items()}
    for module in graph.modules.values():
        ask = getattr(module, question, None)
        if not callable(ask):
            continue
        try:
            answer = ask()
        except (AttributeError, NotImplementedError):  # the model has none, or does not say
            continue
        if isinstance(answer, nn.Module):
            return names.get(id(answer))
    return None


def find_towers(
    graph: Graph, lists: Sequence[str], embeddings: str | None
) -> tuple[dict[str, str], list[str]]:
    """Towers by name, and those of `lists` that a batch runs through by default.

    Args:
        graph: the backbone.
        lists: the lists of blocks.
        embeddings: the module that embeds the input, if it is known.

    Returns:
        Where each tower sits, by its short name (``vision``, ``text``, or what the model calls
        it), the tower of the input included; and the lists in scope.
    """
    towers: dict[str, str] = {}
    scope = list(lists)
    place = ""
    while True:
        holders = list(
            dict.fromkeys(
                join(place, home[len(place) :].lstrip(".").split(".")[0])
                for home in scope
                if inside(home, place) and home != place
            )
        )
        parts = [h for h in holders if h not in lists]
        home = next((h for h in parts if embeddings and inside(embeddings, h)), None)
        if len(holders) > 1 and embeddings is not None:
            kept = [h for h in holders if h in lists or h == home]
            for part in parts:
                together = _pair(home, part) if home else not _foreign(part, place)
                if part != home and together:
                    kept.append(part)
            for part in parts:
                if part not in kept:
                    towers.setdefault(tower_name(part, towers), part)
            if home and len(kept) < len(holders):
                towers.setdefault(tower_name(home, towers), home)
            scope = [s for s in scope if any(inside(s, k) for k in kept)]
            if home is None or len(kept) > 1:
                return towers, scope
        elif len(holders) != 1 or holders[0] in lists:
            return towers, scope
        place = home or holders[0]


def _foreign(part: str, place: str) -> bool:
    """Whether a part beside the embeddings serves another modality."""
    said = set(words(leaf_of(part)))
    return bool(said & _MODALITY.keys() or said & _ADAPTING)


def _pair(home: str, part: str) -> bool:
    """Whether two parts are the encoder and the decoder of one model."""
    ours, theirs = set(words(leaf_of(home))), set(words(leaf_of(part)))
    kinds = ours & {"encoder", "decoder"}, theirs & {"encoder", "decoder"}
    if kinds[0] | kinds[1] != {"encoder", "decoder"}:
        return False
    bases = ours - _GENERIC, theirs - _GENERIC
    return bases[0] == bases[1] or not bases[0] or not bases[1]


def tower_name(part: str, taken: dict[str, str]) -> str:
    """A short name for the tower at `part`."""
    said = words(leaf_of(part))
    name = next((_MODALITY[word] for word in said if word in _MODALITY), leaf_of(part))
    return name if name not in taken else leaf_of(part) if leaf_of(part) not in taken else part
