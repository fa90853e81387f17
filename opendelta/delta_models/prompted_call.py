"""One call of a model with a soft prompt: what gets longer before it, what is cut after it.

The outermost module that is called and can make ids and mask longer does so, a `Site`: a wrapper
that takes a dict of features, the model itself, or its base model where the caller ran the model's
own `forward` past its hooks. What is in the know of a call that runs is noted by thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opendelta.delta_models.prompt_arguments import SPANS, lengthen, name_of_text
from opendelta.delta_models.prompt_network import PromptNetwork
from opendelta.delta_models.prompt_places import Places
from opendelta.exceptions import InsertionError
from opendelta.ground.containers import Args, Kwargs, first_hidden
from opendelta.ground.seams import frame_of_module_call, has_ended, is_running


class Site(nn.Module):
    """A module at which a call may get longer.

    Args:
        names: of the host's positional arguments, in order.
        embedding: name of the token embedding below the host, where that takes embeddings; None
            where it is handed ids.
        cuts: whether its output is cut to the text in any case.
        is_spare: whether it acts only where no site further out was called.

    Attributes:
        places: where the prompt is in the call that runs; None where it was put in none.
    """

    passes_on = True  # no call need come by

    def __init__(
        self, names: list[str], embedding: str | None, cuts: bool, is_spare: bool = False
    ) -> None:
        super().__init__()
        self.names, self.embedding = names, embedding
        self.cuts, self.is_spare = cuts, is_spare
        self.places: Places | None = None
        self.features: tuple[Any, ...] = ()  # what a wrapper was given, and a copy made longer

    @property
    def prompt(self) -> SoftPromptLayer:
        """The prompt that comes in."""
        raise NotImplementedError


class SoftPromptLayer(Site):
    """The prompt, on the model that it is for.

    Parameters: `soft_embeds` (tokens, embedding width); those of `network`, where one generates it.

    Args:
        soft_embeds: the initial prompt, or the `PromptNetwork` that generates it.
        expand: arguments of shape (batch, tokens, ...) that get longer, and their value there.
        prompt_id: what stands for it among ids, below 0.
        room: how many positions the model has learned, None for any number.
        counts_positions: whether the model is told positions where the caller tells none.
        options: see `Site`.
    """

    def __init__(
        self,
        soft_embeds: Tensor | PromptNetwork,
        expand: Mapping[str, int],
        prompt_id: int,
        room: int | None,
        counts_positions: bool,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(soft_embeds, PromptNetwork):
            self.network: PromptNetwork | None = soft_embeds
            self.count = soft_embeds.embedding.num_embeddings
        else:
            self.soft_embeds, self.network = nn.Parameter(soft_embeds), None
            self.count = len(soft_embeds)
        self.expand = dict(expand)
        self.prompt_id, self.room, self.counts_positions = prompt_id, room, counts_positions
        self.mark: list[Any] = []  # what its replicas share

    @property
    def prompt(self) -> SoftPromptLayer:
        return self

    def extra_repr(self) -> str:
        way = "in the place of ids" if self.embedding is None else "as embeddings"
        return f"tokens={self.count}, enters {way}"

    def values(self) -> Tensor:
        """The prompt as it is now, (tokens, width)."""
        return self.soft_embeds if self.network is None else self.network()

    def forward(self, values: Tensor, places: Places | Tensor) -> Tensor:
        """The embeddings `values` with the prompt among them.

        Args:
            values: (batch, tokens, width), of the text alone; or of as many positions as there are.
            places: where the prompt comes between them; or which of them are the prompt's.
        """
        prompt = self.values().to(values)
        if isinstance(places, Places):
            return places.put(values, prompt)
        rank = (places.cumsum(-1) - 1) % self.count
        return torch.where(places.unsqueeze(-1), prompt[rank], values)


class FurtherSite(Site):
    """A site beside that of the prompt itself: inside its model, or around it.

    Args:
        layer: the prompt; `home`: its model.
        options: see `Site`.
    """

    def __init__(self, layer: SoftPromptLayer, home: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self._prompt, self.home = [layer], [home]  # children of others, not of this one

    @property
    def prompt(self) -> SoftPromptLayer:
        return self._prompt[0]


class Entrance(nn.Module):
    """On the token embedding: puts the prompt where ids stand for it, and sees what was missed.

    Args:
        layer: the prompt; `home`: the model that it is for.
        by_ids: whether ids stand for it in compiled code, where no call is noted.
    """

    def __init__(self, layer: SoftPromptLayer, home: nn.Module, by_ids: bool) -> None:
        super().__init__()
        self.prompt, self.home, self.by_ids = [layer], [home], by_ids
        self.standing_in: Tensor | None = None  # which ids of a call stand for the prompt

    @staticmethod
    def routed(
        entrances: list[Entrance], rows: Any, host: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """All on the whole batch: which positions are whose, the ids tell."""
        for entrance in entrances:
            args, kwargs = stand_in(entrance, host, args, kwargs)
        return args, kwargs


# --- which call runs ------------------------------------------------------------------------------


class Led(NamedTuple):
    """A call that a site has made longer.

    Attributes:
        site: which site; `host`: its module; `frame`: the call.
    """

    site: Site
    host: nn.Module
    frame: FrameType


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[Led] = []


_RUNNING = _Running()


def led(layer: SoftPromptLayer) -> Led | None:
    """The call that runs in this thread with this prompt; None in compiled code."""
    if torch.compiler.is_compiling():
        return None
    here = [call for call in _RUNNING.calls if call.site.prompt.mark is layer.mark]
    return next((call for call in reversed(here) if not has_ended(call.frame)), None)


def _note(site: Site, host: nn.Module) -> None:
    frame = None if torch.compiler.is_compiling() else frame_of_module_call()
    if frame is not None:
        _RUNNING.calls.append(Led(site, host, frame))


def leave(host: nn.Module, args: Any, output: Any) -> None:
    """After a host, also after an error: its call is over."""
    if torch.compiler.is_compiling():
        return
    over = [c for c in _RUNNING.calls if c.host is host or has_ended(c.frame)]
    for call in over:
        _RUNNING.calls.remove(call)
        call.site.places, call.site.features = None, ()


# --- before and after a site ----------------------------------------------------------------------


def enter(site: Site, host: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Before a model: hand it the text with the prompt, and all else as long."""
    layer = site.prompt
    site.places = None
    if led(layer) is not None or (site.is_spare and torch.compiler.is_compiling()):
        return args, kwargs
    given = {**dict(zip(site.names, args, strict=False)), **kwargs}
    name = name_of_text(layer, given, site.embedding is not None)
    if name is None:
        return args, kwargs
    text: Tensor = given[name]
    if site.is_spare and not site.cuts:
        _require_no_labels(site, text)
    _note(site, host)
    site.places = places = lengthen(given, layer, text)
    if places is not None and text.is_floating_point():
        given[name] = layer(text, places)
    elif places is not None and site.embedding is None:
        rows = places.put(
            text.view(-1, text.shape[-1]) if text.dim() < 2 else text, layer.prompt_id
        )
        given[name] = rows.view(-1) if text.dim() < 2 else rows
    elif places is not None:
        given["input_ids"] = None
        given["inputs_embeds"] = layer(host.get_submodule(str(site.embedding))(text), places)
    rest = args[len(site.names) :]  # of a ``forward(self, *args)``
    return (*(given.pop(n) for n in site.names[: len(args)]), *rest), given


def rest(site: Site, host: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Before a model that only holds the prompt."""
    return args, kwargs


def enter_features(site: Site, host: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Before a wrapper that takes a dict of features: a longer copy of it."""
    layer = site.prompt
    site.places = None
    features: Any = args[0] if args and isinstance(args[0], Mapping) else {}
    ids = features.get("input_ids")
    if torch.compiler.is_compiling() or not isinstance(ids, Tensor) or led(layer) is not None:
        return args, kwargs
    _note(site, host)
    longer = dict(features)
    site.places = places = lengthen(longer, layer, ids)
    if places is not None:
        longer["input_ids"] = places.put(ids, layer.prompt_id)
    site.features = features, dict(longer)
    return (longer, *args[1:]), kwargs


def cut(site: Site, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """After a model: cut outputs of shape (batch, prompt and text, ...) to the text, if need be."""
    places, site.places = site.places, None
    if places is None or not (site.cuts or _in_a_trainer()):
        return output
    of_spans = SPANS[0] in site.names  # such a model returns scores (batch, positions)
    if isinstance(output, Mapping):
        found = {key: _cut(value, places, of_spans) for key, value in output.items()}
        return type(output)(**found)
    return _cut(output, places, of_spans)


def cut_features(site: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """After such a wrapper: the features that it was given, with what it added, cut to the text."""
    places, site.places = site.places, None
    if places is None or not isinstance(output, dict):
        return output
    (features, longer), site.features = site.features, ()
    features.update(
        (key, _cut(value, places, False))
        for key, value in output.items()
        if longer.get(key) is not value
    )
    return features


def _cut(value: Any, places: Places, of_spans: bool) -> Any:
    if isinstance(value, Tensor):
        is_sequence = value.dim() == 3 or (value.dim() == 2 and of_spans)
        return places.cut(value) if is_sequence and value.shape[1] == places.total else value
    if type(value) in (tuple, list):
        return type(value)(_cut(item, places, of_spans) for item in value)
    return value


def _in_a_trainer() -> bool:
    """Whether transformers' Trainer runs the model, whose own labels are as long as the text."""
    return not torch.compiler.is_compiling() and any(
        is_running(step, "transformers.trainer") for step in ("training_step", "prediction_step")
    )


# --- at the token embedding -----------------------------------------------------------------------


def stand_in(
    entrance: Entrance, embedding: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Before the embedding: note which ids stand for the prompt, and hand it others for them.

    Raises:
        InsertionError: where the forward of the model was called past its hooks.
    """
    layer, entrance.standing_in = entrance.prompt[0], None
    call = led(layer)
    if call is None and not torch.compiler.is_compiling():
        _require_not_missed(entrance)
    if not (entrance.by_ids if call is None else call.site.embedding is None):
        return args, kwargs
    ids = first_hidden(args, kwargs)
    if ids.is_floating_point():
        return args, kwargs
    entrance.standing_in = ids == layer.prompt_id
    valid = torch.where(entrance.standing_in, 0, ids)
    if args:
        return (valid, *args[1:]), kwargs
    return args, {name: valid if value is ids else value for name, value in kwargs.items()}


class FillIn:
    """After the embedding and all deltas on it: puts the prompt where ids stood for it.

    Args:
        entrance: which noted the places; on a replica, and on a copy, it is a child there.
    """

    def __init__(self, entrance: Entrance) -> None:
        self.entrance = entrance

    def __call__(self, embedding: nn.Module, args: Any, output: Any) -> Any:
        here = [child for child in embedding._modules.values() if isinstance(child, Entrance)]
        for entrance in dict.fromkeys([*here, self.entrance]):  # in a route it may be detached
            places, entrance.standing_in = entrance.standing_in, None
            if places is not None and output is not None:
                call = led(entrance.prompt[0])
                layer = entrance.prompt[0] if call is None else call.site.prompt
                output = layer(output, places)
        return output


def _require_not_missed(entrance: Entrance) -> None:
    """Refuse a forward of the prompted model in which no site was called."""
    (home,) = entrance.home
    if _forward_of(home) is not None:
        raise InsertionError(
            f"{type(home).__name__}.forward was called past its hooks, so that the soft prompt "
            "would not act. Call the model itself, model(...); where a wrapper calls forward (as "
            "SentenceTransformer and CrossEncoder do), construct the delta on the wrapper."
        )


def _require_no_labels(site: Any, text: Tensor) -> None:
    """Refuse labels of tokens in a forward that ran past the hooks that make them longer."""
    frame = _forward_of(site.home[0])
    labels = None if frame is None else frame.f_locals.get("labels")
    if isinstance(labels, Tensor) and labels.shape == text.shape[:2]:
        kind = type(site.home[0]).__name__
        raise InsertionError(
            f"{kind}.forward was called past its hooks, with labels that would have to be as long "
            "as prompt and text. Call the model itself, model(..., labels=...)."
        )


def _forward_of(model: nn.Module) -> FrameType | None:
    """The frame of a model's own forward that runs now, further out."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_locals.get("self") is model:
            return frame
        frame = frame.f_back
    return None


# --- encoder-decoders -----------------------------------------------------------------------------


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
    """On a decoder: makes the encoder's mask as long as the prompted encoder's output.

    Args:
        count: length of the prompt.
        names: of the decoder's arguments, in order.
    """

    def __init__(self, count: int, names: list[str]) -> None:
        super().__init__()
        self.count, self.names = count, names
        masks = (n for n in names if n.startswith("encoder_") and n.endswith("mask"))
        self.mask = next(masks, "encoder_attention_mask")

    def pre_forward(self, *args: Any, **kwargs: Any) -> tuple[Args, Kwargs]:
        """The decoder's arguments, in which the encoder's mask is longer by the prompt."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        mask, states = given.get(self.mask), given.get("encoder_hidden_states")
        if not (isinstance(mask, Tensor) and isinstance(states, Tensor) and mask.dim() == 2):
            return args, kwargs
        missing = min(self.count, states.shape[1] - mask.shape[1])
        if missing <= 0:
            return args, kwargs
        longer = Places.before_text(missing, mask.shape[1], mask).put(mask, 1)
        if self.mask in kwargs:
            return args, {**kwargs, self.mask: longer}
        at = self.names.index(self.mask)
        return (*args[:at], longer, *args[at + 1 :]), kwargs
