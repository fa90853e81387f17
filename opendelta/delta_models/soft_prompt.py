"""Soft prompts: trained vectors before the token embeddings (Lester et al. 2021).

https://arxiv.org/abs/2104.08691.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.auto_delta import register
from opendelta.basemodel import DeltaBase
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import ConfigError, InsertionError
from opendelta.insertion import (
    AfterDispatcher,
    Args,
    BeforeDispatcher,
    Kwargs,
    after,
    dotted,
    own_modules,
)

ROOT = "root"
IGNORED_LABEL = -100  # what transformers' and torch's losses leave out


class SoftPromptLayer(nn.Module):
    """The prompt.

    Parameters: `soft_embeds` (tokens, embedding width).

    Args:
        soft_embeds: the initial prompt.
        embedding: name of the token embedding below the host.
        names: names of the host's positional arguments, in order.
        expand: arguments of shape (batch, tokens) that get longer, and their value for the prompt.
        trim: whether the host's outputs are cut to the length of the text.
    """

    def __init__(
        self,
        soft_embeds: Tensor,
        embedding: str,
        names: list[str],
        expand: Mapping[str, int],
        trim: bool,
    ) -> None:
        super().__init__()
        self.soft_embeds = nn.Parameter(soft_embeds)
        self.embedding, self.names, self.expand = embedding, names, dict(expand)
        self.trim = trim
        self.length = 0  # of the text in the call that runs

    def forward(self, embeds: Tensor) -> Tensor:
        """The prompt before `embeds`, (batch, tokens, width) or (tokens, width)."""
        prompt = self.soft_embeds.to(embeds.dtype)
        if embeds.dim() == 3:
            prompt = prompt.expand(embeds.shape[0], -1, -1)
        return torch.cat([prompt, embeds], -2)


def longer(ids: Tensor, count: int, value: int) -> Tensor:
    """`ids` (batch, tokens) with `count` times `value` in front, as a new tensor."""
    front = ids.new_full((ids.shape[0], count), value)
    return torch.cat([front, ids], 1)


def prepend(
    layer: SoftPromptLayer, host: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Before the model: hand it embeddings with the prompt in front, and all else as long."""
    given = {**dict(zip(layer.names, args, strict=False)), **kwargs}
    count = layer.soft_embeds.shape[0]
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is None and embeds is None:
        return args, kwargs
    text: Tensor = ids if embeds is None else embeds  # type: ignore[assignment]
    length = text.shape[1]
    cache = given.get("past_key_values")
    cached = 0 if cache is None or not hasattr(cache, "get_seq_length") else cache.get_seq_length()
    for name, value in layer.expand.items():
        old = given.get(name)
        if not isinstance(old, Tensor) or old.dim() != 2:
            continue
        # With a cache the mask covers all positions so far, the others only the new ones.
        if not cached or (name.endswith("mask") and old.shape[1] < cached + length):
            given[name] = longer(old, count, value)
    positions = given.get("position_ids")
    if positions is not None:
        moved = positions + count
        front = torch.arange(count, device=moved.device).expand(*moved.shape[:-1], -1)
        given["position_ids"] = moved if cached else torch.cat([front, moved], -1)
    layer.length = length
    if not cached:
        if embeds is None:
            embeds = host.get_submodule(layer.embedding)(ids)
        given["input_ids"], given["inputs_embeds"] = None, layer(embeds)
        labels = given.get("labels")
        if isinstance(labels, Tensor) and labels.shape == text.shape[:2]:
            given["labels"] = longer(labels, count, IGNORED_LABEL)
    return (), given


def trim(layer: SoftPromptLayer, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """After the model: cut outputs of shape (batch, prompt and text, ...) to the text."""
    count = layer.soft_embeds.shape[0]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_sequence = value.dim() >= 3 and value.shape[1] == count + layer.length
            return value[:, count:] if is_sequence else value
        return type(value)(map(cut, value)) if type(value) in (tuple, list) else value

    if isinstance(output, Mapping):
        return type(output)(**{key: cut(value) for key, value in output.items()})
    return cut(output)


class CrossMask(nn.Module):
    """On a decoder: makes the encoder's mask as long as the prompted encoder's output."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def pre_forward(self, *args: Any, **kwargs: Any) -> tuple[Args, Kwargs]:
        """The decoder's arguments with `encoder_attention_mask` longer by the prompt."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if isinstance(mask, Tensor) and isinstance(states, Tensor) and mask.dim() == 2:
            if mask.shape[1] + self.count == states.shape[1]:
                kwargs = {**kwargs, "encoder_attention_mask": longer(mask, self.count, 1)}
        return args, kwargs


class SoftPromptConfig(BaseDeltaConfig):
    """Config of `SoftPromptModel`; its fields are that constructor's arguments."""


@register
class SoftPromptModel(DeltaBase):
    """Trained vectors before the token embeddings; encoder-decoders get them in the encoder.

    Args:
        backbone_model: the model to modify, in place.
        soft_token_num: length of the prompt.
        init_range: a random prompt is uniform in ``[-init_range, init_range]``.
        token_init: start from the embeddings of the first tokens of the vocabulary instead.
        other_expand_ids: arguments of shape (batch, tokens) that must be as long as the input, and
            their value at the prompt. The caller's tensors are not changed. ``position_ids`` and
            ``labels`` follow by themselves, labels with -100.
        modified_modules: the model whose input is prompted, where it is not to be found by
            itself (``"root"`` is the backbone).
        exclude_modules: see `DeltaBase`, also for the arguments that follow.
        trim_output: cut the returned sequences to the text, without the prompt's positions.

    Raises:
        InsertionError: if no token embedding is found.
        ConfigError: for a length below 1, or above the vocabulary with `token_init`.
    """

    delta_type: ClassVar[str] = "soft_prompt"
    config_class = SoftPromptConfig
    default_modified_modules: ClassVar[list[str]] = [ROOT]

    soft_token_num: int
    init_range: float
    token_init: bool
    other_expand_ids: dict[str, int]
    trim_output: bool

    def __init__(
        self,
        backbone_model: nn.Module,
        soft_token_num: int = 100,
        init_range: float = 0.5,
        token_init: bool = True,
        other_expand_ids: dict[str, int] = {"attention_mask": 1, "token_type_ids": 0},  # noqa: B006
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        *,
        trim_output: bool = False,
    ) -> None:
        self._construct(locals())

    def plan(self, backbone: nn.Module, patterns: list[str]) -> None:
        """Put the prompt on the model that takes token ids."""
        if self.soft_token_num < 1:
            raise ConfigError(f"soft_token_num={self.soft_token_num}; expected 1 or more.")
        if list(patterns) == [ROOT]:
            name, host = _prompted(backbone)
        else:
            (name, *_) = [n for hits in self.find_targets(patterns) for n in hits]
            host = backbone.get_submodule(name)
        embedding_name, embedding = _embedding_of(name, host)
        arguments = inspect.signature(type(host).forward).parameters
        layer = SoftPromptLayer(
            self._initial(embedding),
            embedding_name,
            [n for n in arguments if n != "self"],
            self.other_expand_ids,
            self.trim_output,
        )
        if "inputs_embeds" in arguments:
            self.insert_action(host, layer, "soft_prompt_layer", BeforeDispatcher, prepend)
            if self.trim_output:
                self.insert_action(host, layer, "soft_prompt_layer", AfterDispatcher, trim)
        else:  # a network without that argument: the prompt joins what its embedding returns
            self.insert_action(embedding, layer, "soft_prompt_layer", AfterDispatcher, after)
        decoder = name.rpartition(".")[0]
        decoder = dotted(decoder, "decoder") if name.rpartition(".")[2] == "encoder" else ""
        if decoder and (module := dict(own_modules(backbone)).get(decoder)) is not None:
            mask = CrossMask(self.soft_token_num)
            self.insert_module(module, "before", mask, "soft_prompt_mask")

    def _initial(self, embedding: Any) -> Tensor:
        count, vocabulary = self.soft_token_num, embedding.num_embeddings
        width = embedding.embedding_dim
        if not self.token_init:
            return torch.empty(count, width).uniform_(-self.init_range, self.init_range)
        if count > vocabulary:
            raise ConfigError(
                f"soft_token_num={count} exceeds the vocabulary of {vocabulary}: a prompt made "
                "from token embeddings can be no longer; pass token_init=False."
            )
        ids = torch.arange(count, device=next(embedding.parameters()).device)
        with torch.no_grad():
            return nn.functional.embedding(ids, embedding.weight).clone()


def _prompted(backbone: nn.Module) -> tuple[str, Any]:
    """(name, module) of the outermost model that takes token ids, its encoder if it has two."""
    name: str
    module: Any
    for name, module in own_modules(backbone):
        if hasattr(module, "get_input_embeddings"):
            config = getattr(module, "config", None)
            if getattr(config, "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
                encoder = module.get_encoder()
                return next((n, m) for n, m in own_modules(backbone) if m is encoder)
            return name, module
    return "", backbone


def _embedding_of(name: str, host: Any) -> tuple[str, nn.Module]:
    """(name below the host, module) of the host's token embedding."""
    wanted = None
    if hasattr(host, "get_input_embeddings"):
        wanted = host.get_input_embeddings()
    for inner_name, module in own_modules(host):
        if module is wanted or (wanted is None and isinstance(module, nn.Embedding)):
            if hasattr(module, "num_embeddings"):
                return inner_name, module
    raise InsertionError(
        f"No token embedding is found in {name or type(host).__name__!r}: a soft prompt goes "
        "before token embeddings. Name the model that holds one in modified_modules."
    )
