"""One call of a model with a soft prompt: what gets longer before it, what is cut after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.delta_models.cache import cached_positions
from opendelta.exceptions import InsertionError
from opendelta.ground.containers import Args, Kwargs, first_hidden

PROMPT_ID = -1  # stands for a position of the prompt among ids

IGNORED_LABEL = -100  # what transformers' and torch's losses leave out

SPANS = ("start_positions", "end_positions")  # labels that count positions

COUNTS = (*SPANS, "length")  # so do ModelCenter's lengths of the texts


class SoftPromptLayer(nn.Module):
    """The prompt.

    Parameters: `soft_embeds` (tokens, embedding width).

    Args:
        soft_embeds: the initial prompt.
        embedding: name of the token embedding below the host.
        names: names of the host's positional arguments, in order.
        expand: arguments of shape (batch, tokens, ...) that get longer, and their value there.
    """

    def __init__(
        self, soft_embeds: Tensor, embedding: str, names: list[str], expand: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.soft_embeds = nn.Parameter(soft_embeds)
        self.embedding, self.names, self.expand = embedding, names, dict(expand)
        self.count = soft_embeds.shape[0]
        self.length = 0  # of the text in the call that runs; 0 where no prompt was put before it
        self.standing_in: Tensor | None = None  # which ids of a call stand for the prompt

    def forward(self, embeds: Tensor) -> Tensor:
        """The prompt before `embeds`, (batch, tokens, width)."""
        prompt = self.soft_embeds.to(embeds).expand(embeds.shape[0], -1, -1)
        return torch.cat([prompt, embeds], 1)


def longer(ids: Tensor, count: int, value: int) -> Tensor:
    """`ids` (batch, tokens, ...) or (tokens) with `count` times `value` in front, a new tensor."""
    at = min(1, ids.dim() - 1)
    front = ids.new_full((*ids.shape[:at], count, *ids.shape[at + 1 :]), value)
    return torch.cat([front, ids], at)


def prepend(
    layer: SoftPromptLayer, host: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Before the model: hand it embeddings with the prompt in front, and all else as long."""
    given = {**dict(zip(layer.names, args, strict=False)), **kwargs}
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    layer.length = 0
    if ids is None and embeds is None:
        return args, kwargs
    text: Tensor = ids if embeds is None else embeds  # type: ignore[assignment]
    if lengthen(given, layer, text.shape[:2]):
        if embeds is None:
            embeds = host.get_submodule(layer.embedding)(ids)
        given["input_ids"], given["inputs_embeds"] = None, layer(embeds)
        layer.length = text.shape[1]
    return (), given


class Companion(nn.Module):
    """On a model that takes ids alone: ids and what goes along with them get longer.

    Args:
        count: length of the prompt.
        names, expand: see `SoftPromptLayer`.
    """

    def __init__(self, count: int, names: list[str], expand: Mapping[str, int]) -> None:
        super().__init__()
        self.count, self.names, self.expand = count, names, dict(expand)
        self.length = 0

    def pre_forward(self, *args: Any, **kwargs: Any) -> tuple[Args, Kwargs]:
        """The model's arguments, with ids that stand for the prompt before those of the text."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        known = {*self.expand, "labels", *COUNTS}
        tensors = [n for n, v in given.items() if isinstance(v, Tensor) and n not in known]
        name = "input_ids" if "input_ids" in tensors else next(iter(tensors), None)
        self.length = 0
        if name is not None:
            text: Tensor = given[name]
            if lengthen(given, self, text.shape[:2]):
                given[name] = longer(text, self.count, PROMPT_ID)
                self.length = text.shape[1] if text.dim() > 1 else 0
        rest = args[len(self.names) :]  # of a ``forward(self, *args)``
        return (*(given.pop(n) for n in self.names[: len(args)]), *rest), given


def stand_in(
    layer: SoftPromptLayer, embedding: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Before the embedding: note which ids stand for the prompt, and hand it others for them."""
    ids = first_hidden(args, kwargs)
    layer.standing_in = ids == PROMPT_ID
    valid = ids.clamp(min=0)
    if args:
        return (valid, *args[1:]), kwargs
    return args, {name: valid if value is ids else value for name, value in kwargs.items()}


def fill_in(
    layer: SoftPromptLayer, embedding: nn.Module, args: Args, kwargs: Kwargs, output: Tensor
) -> Tensor:
    """After the embedding: put the prompt where ids stood for it."""
    places, layer.standing_in = layer.standing_in, None
    if places is None:
        return output
    rank = (places.cumsum(-1) - 1).clamp(min=0, max=layer.count - 1)
    return torch.where(places.unsqueeze(-1), layer.soft_embeds.to(output)[rank], output)


def lengthen(given: Kwargs, layer: SoftPromptLayer | Companion, shape: torch.Size) -> bool:
    """Make the arguments that go along with the text as long as prompt and text.

    Args:
        given: the arguments, changed in place; their tensors are not.
        layer: says how long the prompt is, and what goes along.
        shape: (batch, tokens) of the text.

    Returns:
        Whether the prompt is to come now; else it is in the cache already.
    """
    count, cached = layer.count, cached_positions(given)
    for name, value in layer.expand.items():
        old, is_mask = given.get(name), name.endswith("mask")
        if old is None or (cached and not is_mask):
            continue  # with a cache the mask covers all positions so far, the others the new ones
        if not isinstance(old, Tensor) or (is_mask and old.dim() > 2):
            raise InsertionError(
                f"{name} is not of shape (batch, tokens), so a soft prompt cannot make it longer. "
                "Static caches bring such masks: leave cache_implementation at its default."
            )
        if old.shape[-1] < cached + shape[-1] or not cached:
            given[name] = longer(old, count, value)
    positions = given.get("position_ids")
    if positions is not None:
        moved = positions + count
        front = torch.arange(count, device=moved.device).expand(*moved.shape[:-1], -1)
        given["position_ids"] = moved if cached else torch.cat([front, moved], -1)
    labels = given.get("labels")
    if isinstance(labels, Tensor) and labels.shape == shape and not cached:
        scores_of_classes = labels.is_floating_point()
        given["labels"] = labels if scores_of_classes else longer(labels, count, IGNORED_LABEL)
    for name in COUNTS:
        if isinstance(given.get(name), Tensor):
            given[name] = given[name] + count
    return not cached


def trim(
    layer: SoftPromptLayer | Companion, host: nn.Module, args: Args, kwargs: Kwargs, output: Any
) -> Any:
    """After the model: cut outputs of shape (batch, prompt and text, ...) to the text."""
    of_spans = SPANS[0] in layer.names  # such a model returns scores (batch, positions)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_sequence = value.dim() == 3 or (value.dim() == 2 and of_spans)
            return value[:, layer.count :] if is_sequence and value.shape[1] == total else value
        return type(value)(map(cut, value)) if type(value) in (tuple, list) else value

    if not layer.length:
        return output
    total = layer.count + layer.length
    if isinstance(output, Mapping):
        return type(output)(**{key: cut(value) for key, value in output.items()})
    return cut(output)


class TrimEncoder(nn.Module):
    """On an encoder-decoder: cuts the encoder's states that it returns to the text."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


def trim_encoder(
    delta: TrimEncoder, host: nn.Module, args: Args, kwargs: Kwargs, output: Any
) -> Any:
    """After an encoder-decoder that ran its encoder: cut the encoder's states to the text."""
    if not isinstance(output, Mapping) or kwargs.get("encoder_outputs") is not None:
        return output
    cut = dict(output)
    if isinstance(cut.get("encoder_last_hidden_state"), Tensor):
        cut["encoder_last_hidden_state"] = cut["encoder_last_hidden_state"][:, delta.count :]
    if cut.get("encoder_hidden_states") is not None:
        cut["encoder_hidden_states"] = tuple(
            state[:, delta.count :] for state in cut["encoder_hidden_states"]
        )
    return type(output)(**cut)


class CrossMask(nn.Module):
    """On a decoder: makes the encoder's mask as long as the prompted encoder's output."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def pre_forward(self, *args: Any, **kwargs: Any) -> tuple[Args, Kwargs]:
        """The decoder's arguments with `encoder_attention_mask` longer by the prompt."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if isinstance(mask, Tensor) and isinstance(states, Tensor) and mask.dim() == 2:
            missing = min(self.count, states.shape[1] - mask.shape[1])
            if missing > 0:
                kwargs = {**kwargs, "encoder_attention_mask": longer(mask, missing, 1)}
        return args, kwargs
