"""Before and after the modules at which a call with a soft prompt gets longer.

The outermost one that is called and can make ids and mask longer does so: a wrapper that takes a
dict of features, the model itself, or its base model where the caller ran the model's own `forward`
past its hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.delta_models.prompt_arguments import SPANS, lengthen, name_of_text
from opendelta.delta_models.prompt_layer import Site
from opendelta.delta_models.prompt_places import Places
from opendelta.delta_models.prompted_call import (
    PromptedCall,
    begin,
    end_compiled,
    held,
    is_entered,
)
from opendelta.exceptions import InsertionError
from opendelta.ground.containers import Args, Kwargs
from opendelta.ground.seams import forward_of, is_running


def enter(site: Site, host: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Before a model: hand it the text with the prompt, and all else as long."""
    layer = site.prompt
    if is_entered(layer):
        return args, kwargs
    given = {**dict(zip(site.names, args, strict=False)), **kwargs}
    name = name_of_text(layer, given, site.embedding is not None)
    if name is None:
        return args, kwargs
    text: Tensor = given[name]
    if site.is_spare and not site.cuts:
        _require_no_labels(site, text)
    places = lengthen(given, layer, text)
    begin(site, host).places = places
    if places is not None and text.is_floating_point():
        given[name] = layer(text, places)
    elif places is not None and site.embedding is None:
        rows = places.put(text[None] if text.dim() == 1 else text, layer.prompt_id)
        given[name] = rows[0] if text.dim() == 1 else rows
    elif places is not None:
        given["input_ids"] = None
        given["inputs_embeds"] = layer(host.get_submodule(str(site.embedding))(text), places)
    more = args[len(site.names) :]  # of a ``forward(self, *args)``
    return (*(given.pop(n) for n in site.names[: len(args)]), *more), given


def hold(site: Site, host: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Before a model that only holds the prompt, which comes in at its base model."""
    return args, kwargs


def enter_features(site: Site, host: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Before a wrapper that takes a dict of features: a longer copy of it."""
    layer = site.prompt
    features: Any = args[0] if args and isinstance(args[0], Mapping) else {}
    ids = features.get("input_ids")
    if torch.compiler.is_compiling() or not isinstance(ids, Tensor) or is_entered(layer):
        return args, kwargs
    longer = dict(features)
    places = lengthen(longer, layer, ids)
    if places is not None:
        longer["input_ids"] = places.put(ids, layer.prompt_id)
    call = begin(site, host)
    assert isinstance(call, PromptedCall)
    call.places, call.features = places, (features, dict(longer))
    return (longer, *args[1:]), kwargs


def cut(site: Site, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """After a model: cut outputs of shape (batch, prompt and text, ...) to the text, if need be."""
    holder = held(site, host)
    places = None if holder is None else holder.places
    end_compiled(site)
    if places is None or not (site.cuts or _in_a_trainer()):
        return output
    of_spans = SPANS[0] in site.names  # such a model returns scores (batch, positions)
    if isinstance(output, Mapping):
        found = {key: _cut(value, places, of_spans) for key, value in output.items()}
        return type(output)(**found)
    return _cut(output, places, of_spans)


def cut_features(site: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """After such a wrapper: the features that it was given, with what it added, cut to the text."""
    call = held(site, host)
    if not isinstance(call, PromptedCall) or call.places is None or not isinstance(output, dict):
        return output
    features, longer = call.features
    for key, value in output.items():
        if longer.get(key) is not value:
            features[key] = _cut(value, call.places, False)
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


def _require_no_labels(site: Any, text: Tensor) -> None:
    """Refuse labels of tokens in a forward that ran past the hooks that make them longer."""
    if torch.compiler.is_compiling():  # torch will find the two unequally long
        return
    model = site.home[0]
    frame = forward_of(model)
    labels = None if frame is None else frame.f_locals.get("labels")
    if isinstance(labels, Tensor) and labels.shape == text.shape[:2]:
        raise InsertionError(
            f"{type(model).__name__}.forward was called past its hooks, with labels that would "
            "have to be as long as prompt and text. Call the model itself, model(..., labels=...)."
        )
