"""Which model inside a backbone is prompted, and what is to be known of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from opendelta.exceptions import InsertionError
from opendelta.ground.names import words
from opendelta.ground.widths import is_embedding
from opendelta.mechanism.ownership import own_modules
from opendelta.signature import get_arg_names_inside_func, names_in_code

_POSITIONS = {"wpe", "pos", "position", "positional", "positions"}
_NO_TOKENS = {"pos", "position", "positional", "positions", "type", "segment", "relative"}


def prompted_model(backbone: nn.Module) -> tuple[str, Any]:
    """(name, module) of the outermost model that embeds ids, its encoder if that does."""
    names = {id(module): name for name, module in own_modules(backbone)}
    for name, module in own_modules(backbone):
        inner: Any = module
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            encoder = inner.get_encoder() if hasattr(inner, "get_encoder") else None
            if encoder is not None and (
                _input_embedding(encoder) is not None or "input_ids" in argument_names(encoder)
            ):
                return names[id(encoder)], encoder
            if encoder is not None and encoder is not module:
                continue  # it encodes something else; its decoder, further inside, embeds ids
        if _input_embedding(module) is not None:
            return name, module
    return "", backbone


def _input_embedding(module: nn.Module) -> Any:
    """The token embedding that a transformers model says it has."""
    try:
        found = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # it says none
        return None
    return found if hasattr(found, "num_embeddings") else None


def decoder_beside(around: list[Any], encoder: nn.Module) -> nn.Module | None:
    """The decoder of the encoder-decoder, among the modules around it, whose encoder this is."""
    for model in around:
        pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if pair and hasattr(model, "get_decoder") and model.get_encoder() is encoder:
            found: nn.Module | None = model.get_decoder()
            return None if found is encoder else found
    beside = [m._modules.get("decoder") for m in around if m._modules.get("encoder") is encoder]
    return next((module for module in beside if module is not None), None)


def argument_names(module: nn.Module) -> list[str]:
    """The names of a module's arguments, in order."""
    return get_arg_names_inside_func(type(module).forward)


def base_of(home: nn.Module, embedding: str) -> tuple[str, bool]:
    """(name of its base model, whether it reads the ids before it hands them on); "" without one.

    Some look for the last token that is no padding: with embeddings in place of ids they take the
    last position, padding or not. Others flatten ids of shape (batch, choices, tokens).
    """
    names, base = names_in_code(type(home).forward), getattr(home, "base_model_prefix", "")
    inner = home._modules.get(base) if base else None
    if (
        inner is None
        or not embedding.startswith(base + ".")
        or "input_ids" not in argument_names(inner)
    ):
        return "", False
    return base, {"pad_token_id", "argmax"} <= names or "num_choices" in names


def room_of(home: nn.Module) -> int | None:
    """How many positions a model has learned, None for any number."""
    config: Any = getattr(home, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    rooms = []
    for name, module in own_modules(home):
        if is_embedding(module) and _POSITIONS & set(words(name)):
            pad = getattr(module, "padding_idx", None)
            first = getattr(module, "offset", 0) if pad is None else pad + 1
            size: int = getattr(module, "num_embeddings", 0)
            if most <= size <= most + first:  # else it counts something else, as places on a page
                rooms.append(size - first)
    return min(rooms, default=None)


def embedding_of(name: str, host: Any) -> tuple[str, Any]:
    """(name below the host, module) of the host's token embedding.

    It is what `get_input_embeddings` returns, else the first embedding that is not named after
    positions or types.
    """
    found = [(n, m) for n, m in own_modules(host) if is_embedding(m)]
    wanted = _input_embedding(host)
    if wanted is not None:
        found = [(n, m) for n, m in found if m is wanted]
    elif "input_ids" not in (getattr(host, "main_input_name", "input_ids"), *argument_names(host)):
        found = []
    else:
        found = [(n, m) for n, m in found if not _NO_TOKENS & set(words(n))]
    if not found:
        raise InsertionError(
            f"No token embedding is found in {name or type(host).__name__!r}: a soft prompt goes "
            "before token embeddings, which models of pixels or sounds have not. Where there is "
            "one elsewhere, name the model that holds it in modified_modules."
        )
    return found[0]
