"""What goes along with the text of a call, made as long as prompt and text."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from opendelta.delta_models.cache import cached_positions
from opendelta.delta_models.prompt_places import Places
from opendelta.exceptions import InsertionError
from opendelta.ground.containers import Kwargs
from opendelta.ground.seams import is_running, prefill_is_cut

IGNORED_LABEL = -100  # what transformers' and torch's losses leave out

SPANS = ("start_positions", "end_positions")  # labels that count positions

COUNTS = (*SPANS, "length")  # so do ModelCenter's lengths of the texts

KINDS = {"mm_token_type_ids": 0}  # which tokens stand for images; the prompt's are text

# Parts of the names of arguments that hold positions, in a form that is not known here.
_PLACES = {"positions", "position", "spans", "span", "index", "indices"}
_ELSEWHERE = {"decoder", "encoder", "pixel", "image", "video", "audio", "visual", "bbox"}

PACKED = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens_k")  # where texts begin, without positions


class Prompt(Protocol):
    """What a soft prompt says of itself.

    Attributes:
        count: how many positions it has.
        expand: arguments of shape (batch, tokens, ...) that get longer, and their value there.
        room: how many positions its model has learned, None for any number.
        counts_positions: whether the model is told positions where the caller tells none.
    """

    count: int
    expand: dict[str, int]
    room: int | None
    counts_positions: bool


def name_of_text(prompt: Prompt, given: Kwargs, is_named: bool) -> str | None:
    """Which argument holds the ids or embeddings of the text; None if there is none.

    Args:
        prompt: the prompt; `given`: the arguments.
        is_named: whether it is called as transformers' models call it.

    Raises:
        InsertionError: if both are given.
    """
    there = [n for n in ("input_ids", "inputs_embeds") if isinstance(given.get(n), Tensor)]
    if len(there) > 1:
        raise InsertionError("input_ids and inputs_embeds are both given; a model takes one.")
    if there or is_named:
        return next(iter(there), None)
    known = {*KINDS, *prompt.expand, "labels", *COUNTS}
    return next((n for n, v in given.items() if isinstance(v, Tensor) and n not in known), None)


def lengthen(given: Kwargs, prompt: Prompt, text: Tensor) -> Places | None:
    """Make the arguments that go along with the text as long as prompt and text.

    Args:
        given: the arguments, changed in place; their tensors are not.
        prompt: which knows what goes along.
        text: ids (batch, tokens) or (tokens), or embeddings (batch, tokens, width).

    Returns:
        Where the prompt is to come now; None if it is in the cache already.

    Raises:
        InsertionError: for arguments that do not fit, and where learned positions end before.
    """
    count, cached = prompt.count, cached_positions(given)
    tokens = text.shape[min(1, text.dim() - 1)]
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    _require_fit(prompt, given, tokens, cached)
    starts = _starts(given, tokens) if not cached else None
    if starts is not None:
        places = Places.before_each(count, starts)
    else:
        places = Places.before_text(count, tokens, mask if not cached else None)
    if prompt.room is not None and not cached and positions is None and places.total > prompt.room:
        raise InsertionError(
            f"{tokens} tokens with a soft prompt of {count} make {places.total} positions, and the "
            f"model has learned {prompt.room}: cut the text to {prompt.room - count}."
        )
    for name, value in {**KINDS, **prompt.expand}.items():
        old = given.get(name)
        if old is None:
            continue
        if not cached:
            given[name] = places.put(old, value)
        elif name.endswith("mask") and old.shape[-1] < cached + tokens:
            # With a cache it covers all positions so far; the others cover the new ones.
            given[name] = Places.before_text(count, old.shape[-1], old).put(old, value)
    if positions is not None:
        given["position_ids"] = positions + count if cached else _moved(positions, places, text)
    elif prompt.counts_positions and isinstance(mask, Tensor):
        shown = (given["attention_mask"] != 0).cumsum(1) > 0
        now = tokens if cached else places.total  # counted from the first one that is shown
        given["position_ids"] = (shown.cumsum(1) - 1).clamp(min=0)[:, -now:]
    labels = given.get("labels")
    if isinstance(labels, Tensor) and labels.shape == text.shape[:2] and not cached:
        scores_of_classes = labels.is_floating_point()
        given["labels"] = labels if scores_of_classes else places.put(labels, IGNORED_LABEL)
    for name in COUNTS:
        if isinstance(given.get(name), Tensor):  # of spans, models take -1 for the first token
            given[name] = given[name].clamp(min=0) + count
    kept = given.get("logits_to_keep")
    if isinstance(kept, Tensor) and not cached:
        given["logits_to_keep"] = torch.where(kept < 0, kept, kept + count)
    return None if cached else places


def _moved(positions: Tensor, places: Places, text: Tensor) -> Tensor:
    """Positions (..., batch or 1, tokens) or (tokens), with those of the prompt among them."""
    if positions.dim() < 3:
        return places.moved(positions.expand(text.shape[0], -1))
    return torch.stack([places.moved(of_axis) for of_axis in positions])


def _starts(given: Kwargs, tokens: int) -> Tensor | None:
    """Where texts begin in rows that hold several, (batch, tokens); None where none does.

    They are told by positions that go no further than those before, of tokens that the mask shows.
    """
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is None or positions.dim() > 2 or tokens < 2:
        return None
    rows = positions if positions.dim() == 2 else positions[None]
    again = rows[:, 1:] <= rows[:, :-1]
    first = torch.cat([again.new_ones(len(again), 1), torch.zeros_like(again)], 1)
    if isinstance(mask, Tensor):
        shown = mask != 0
        again = again & shown[:, 1:] & shown[:, :-1]
        first = shown & (shown.cumsum(1) == 1)
    if torch.compiler.is_compiling():  # where rows cannot get longer by as much as they say
        said = "Rows that hold several texts get a soft prompt before each in eager code alone."
        torch._assert_async(~again.any(), said)
        return None
    if not bool(again.any()):
        return None
    return first | torch.cat([torch.zeros_like(again[:, :1]), again], 1)


def _require_fit(prompt: Prompt, given: Kwargs, tokens: int, cached: int) -> None:
    """Refuse arguments that are not as long as the text."""
    packed = next((name for name in PACKED if given.get(name) is not None), None)
    if packed is not None:
        raise InsertionError(
            f"{packed} says where the texts of a row begin, and a soft prompt would have to move "
            "that: pack rows by position_ids that start again (attn_implementation='sdpa' or "
            "'eager'), or do not pack."
        )
    for name in {**KINDS, **prompt.expand}:
        old = given.get(name)
        if old is None or (cached and not name.endswith("mask")):
            continue
        if not isinstance(old, Tensor) or (name.endswith("mask") and old.dim() != 2):
            shape = tuple(old.shape) if isinstance(old, Tensor) else type(old).__name__
            raise InsertionError(
                f"{name} is not of shape (batch, tokens) but {shape}, so a soft prompt cannot make "
                "it longer. Static caches bring such masks: leave cache_implementation at its "
                "default."
            )
        if not cached and old.dim() > 1 and old.shape[1] != tokens:
            raise InsertionError(
                f"{name} is for {old.shape[1]} tokens, and the text has {tokens}: give one of "
                "shape (batch, tokens)."
            )
    for name, value in given.items():
        parts = set(name.split("_"))
        unknown = name not in ("position_ids", *SPANS, *prompt.expand)
        if unknown and isinstance(value, Tensor) and parts & _PLACES and not parts & _ELSEWHERE:
            raise InsertionError(
                f"{name} counts positions, which a soft prompt moves in a way that is not known "
                "of it. Leave it out, or use a PrefixModel, which moves none."
            )
    _require_in_step(cached)
    positions = given.get("position_ids")
    if positions is not None and positions.shape[-1] != tokens:
        raise InsertionError(
            f"position_ids are of shape {tuple(positions.shape)}, and the text has {tokens} tokens."
        )


def _require_in_step(cached: int) -> None:
    """Refuse what `generate` has left of ids that are in a cache already.

    It leaves out as many as the cache holds, the prompt's included, which are none of the ids. Of
    an assistant that is no fault: what it proposes is checked.
    """
    if cached and prefill_is_cut() and not is_running("get_candidates"):
        raise InsertionError(
            f"generate() was given all ids and a cache of {cached} positions, in which the soft "
            "prompt is counted, so that it leaves out too many of them. Pass the ids that are not "
            "in the cache alone, with the mask of all."
        )
