"""Which part of a backbone a batch runs through, where there are several towers.

A model of images and text has a tower for each, and a text batch never reaches the vision tower:
deltas put there by default would be dead weight. So the default scope is the tower that holds the
input embeddings; the others are addressed by name (``vision.attn.q``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from opendelta.addressing.graph import Graph
from opendelta.addressing.roles import says, word_set
from opendelta.ground.names import ancestors, below, dotted, inside, leaf_of, parent_of, words

_MODALITIES = {
    "vision": "vision visual vit image images img pixel pixels video",
    "audio": "audio speech acoustic sound wav mel",
    "text": "text language lm llm",
}
_MODALITY = {word: name for name, said in _MODALITIES.items() for word in said.split()}
# What translates between modalities, or between codes and signals.
_BRIDGES = word_set("resampler perceiver qformer projector connector aligner vocoder codec")
_GENERIC = word_set("model module tower encoder decoder transformer backbone net")


def input_embeddings(graph: Graph) -> str | None:
    """The module that embeds the input: what `get_input_embeddings()` of the model returns.

    A model that takes token ids but does not say (CLIP) is taken to mean its first part that does.
    """
    asked = False
    for module in graph.modules.values():
        if not callable(getattr(module, "get_input_embeddings", None)):
            continue
        answer = _answer(graph, module, "get_input_embeddings")
        if answer is not None and (not asked or hasattr(graph.modules[answer], "num_embeddings")):
            return answer
        if getattr(module, "main_input_name", "input_ids") != "input_ids" and not asked:
            return None
        asked = True
    return None


def output_embeddings(graph: Graph) -> str | None:
    """The module that `get_output_embeddings()` of the outermost model that has it returns."""
    for module in graph.modules.values():
        if callable(getattr(module, "get_output_embeddings", None)):
            return _answer(graph, module, "get_output_embeddings")
    return None


def _answer(graph: Graph, module: nn.Module, question: str) -> str | None:
    try:
        answer = getattr(module, question)()
    except (AttributeError, NotImplementedError):  # the model has none, or does not say
        return None
    names = (name for name, other in graph.modules.items() if other is answer)
    return next(names, None) if isinstance(answer, nn.Module) else None


def find_towers(
    graph: Graph, stacks: Sequence[str], embeddings: str | None
) -> tuple[dict[str, str], list[str]]:
    """The towers by name, and the stacks that a batch runs through by default.

    Args:
        graph: the backbone.
        stacks: the lists of blocks.
        embeddings: the module that embeds the input, if that is known.

    Returns:
        Where each tower sits, by a short name (``vision``, ``text``, or what the model calls it);
        and those of `stacks` that are in scope.
    """
    towers: dict[str, str] = {}
    kept = list(dict.fromkeys(stacks))
    deepest = _around_all(stacks) if embeddings is None else parent_of(embeddings)
    for place in reversed([deepest, *ancestors(deepest)]):
        parts = dict.fromkeys(
            dotted(place, below(stack, place).split(".")[0])
            for stack in kept
            if inside(stack, place) and stack != place
        )
        branches = [part for part in parts if part not in stacks]
        if len(parts) < 2 or not branches:
            continue
        if embeddings is None:  # nothing is known of the input, so all are in scope
            for part in branches:
                if says(part, _MODALITY):
                    towers[_tower_name(part, towers)] = part
            continue
        home = next((part for part in branches if inside(embeddings, part)), None)
        beside_a_stack = len(branches) < len(parts)
        dropped = [
            part
            for part in branches
            if part != home and _is_apart(graph, part, home, beside_a_stack)
        ]
        for part in [home, *dropped] if home and dropped else dropped:
            towers[_tower_name(part, towers)] = part
        kept = [s for s in kept if not any(inside(s, part) for part in dropped)]
    return towers, kept


def _around_all(names: Sequence[str]) -> str:
    """The innermost module around all of `names`."""
    first, *others = names or [""]
    return next(a for a in ancestors(first + ".") if all(inside(other, a) for other in others))


def _is_apart(graph: Graph, part: str, home: str | None, beside_a_stack: bool) -> bool:
    """Whether a batch does not run through `part`.

    Args:
        graph: the backbone.
        part: a branch beside the embeddings, or beside the branch that holds them.
        home: that branch, if there is one.
        beside_a_stack: whether there is a list of blocks at the same level.
    """
    said = set(words(leaf_of(part)))
    modality = {_MODALITY[word] for word in said if word in _MODALITY}
    if home is None:
        own_name = bool(said - _GENERIC) and beside_a_stack
        return own_name or bool(modality) or bool(said & _BRIDGES)
    if _are_pair(home, part):
        return False
    ours = {_MODALITY[word] for word in words(leaf_of(home)) if word in _MODALITY}
    if ours == {"text"}:
        return True
    complete = _answer(graph, graph.modules[part], "get_input_embeddings") is not None
    return bool(modality - ours) or bool(said & _BRIDGES) or complete


def _are_pair(one: str, other: str) -> bool:
    """Whether two branches are the encoder and the decoder of one model."""
    ours, theirs = set(words(leaf_of(one))), set(words(leaf_of(other)))
    if {*ours, *theirs} < {"encoder", "decoder"} or ours & theirs & {"encoder", "decoder"}:
        return False
    if not (ours & {"encoder", "decoder"} and theirs & {"encoder", "decoder"}):
        return False
    ours, theirs = ours - _GENERIC, theirs - _GENERIC
    return ours == theirs or not ours or not theirs


def _tower_name(part: str, taken: dict[str, str]) -> str:
    """A short name for the tower at `part` that is not in `taken`."""
    modality = (_MODALITY[word] for word in words(leaf_of(part)) if word in _MODALITY)
    choices = [*modality, leaf_of(part)]
    return next((choice for choice in choices if choice not in taken), part)
