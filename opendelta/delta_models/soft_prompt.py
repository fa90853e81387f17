"""Soft prompts: trained vectors before the token embeddings (Lester et al. 2021).

https://arxiv.org/abs/2104.08691.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import gathered, is_dtensor
from opendelta.basemodel import DeltaBase
from opendelta.delta.plan import Plan
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.prompted_call import (
    Companion,
    CrossMask,
    SoftPromptLayer,
    TrimEncoder,
    fill_in,
    prepend,
    stand_in,
    trim,
    trim_encoder,
)
from opendelta.exceptions import ConfigError, InsertionError
from opendelta.ground.blocks import within
from opendelta.ground.names import dotted, lineage, words
from opendelta.ground.widths import is_embedding
from opendelta.mechanism.dispatch import AfterDispatcher, BeforeDispatcher
from opendelta.mechanism.engines import require_unsplit
from opendelta.mechanism.ownership import own_modules
from opendelta.signature import get_arg_names_inside_func, names_in_code

ROOT, LAYER = "root", "soft_prompt_layer"
_NO_TOKENS = {"pos", "position", "positional", "positions", "type", "segment", "relative"}


class SoftPromptConfig(BaseDeltaConfig):
    """Config of `SoftPromptModel`; its fields are that constructor's arguments."""


@register
class SoftPromptModel(DeltaBase):
    """Trained vectors before the token embeddings; encoder-decoders get them in the encoder.

    What a model returns for each position it returns for the prompt's too, in front. Where the
    prompt sits in a model inside (the base model of decoders that classify sequences, which look
    for padding among the ids, and of multiple choice; the text model of CLIP; Whisper's decoder),
    the output of that one is cut to the text.

    Args:
        backbone_model: the model to modify, in place.
        soft_token_num: length of the prompt.
        init_range: a random prompt is uniform in ``[-init_range, init_range]``.
        token_init: start from the embeddings of the first tokens of the vocabulary instead.
        other_expand_ids: arguments of shape (batch, tokens) or (batch, tokens, ...) that must be
            as long as the input (``bbox``), and their value at the prompt. The caller's tensors
            are not changed. ``position_ids`` and ``labels`` follow by themselves, labels with -100.
        modified_modules: the model whose input is prompted, where it is not to be found by
            itself (``"root"`` is the backbone).
        exclude_modules: see `DeltaBase`, also for the arguments that follow.
        trim_output: cut the returned sequences to the text, without the prompt's positions.
            Attention weights stay whole; of an encoder-decoder the returned states of the encoder
            are cut.

    Raises:
        InsertionError: if no token embedding is found, or `modified_modules` names several models.
        ConfigError: for a length below 1, or above the vocabulary with `token_init`.
    """

    delta_type: ClassVar[str] = "soft_prompt"
    config_class = SoftPromptConfig
    default_modified_modules: ClassVar[list[str]] = [ROOT]

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
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        self._construct()

    @property
    def added_positions(self) -> int:  # type: ignore[override]
        """How many positions each text gets longer by."""
        return self.soft_token_num

    def plan_targets(self, plan: Plan, patterns: list[str]) -> None:
        """Put the prompt on the model that takes token ids."""
        backbone = plan.backbone
        if self.soft_token_num < 1:
            raise ConfigError(f"soft_token_num={self.soft_token_num}; expected 1 or more.")
        if list(patterns) == [ROOT]:
            name, host = _prompted(backbone)
        else:
            name, *others = [n for hits in self.find_targets(patterns) for n in hits]
            if others:
                raise InsertionError(
                    f"modified_modules={list(patterns)} names {[name, *others]}; a soft prompt "
                    "goes before the input of one model."
                )
            host = backbone.get_submodule(name)
        sites: dict[str, Any] = dict(own_modules(backbone))
        inner = _base_of_id_reader(host)
        if inner:
            name = dotted(name, inner)
            host = sites[name]
        embedding_name, embedding = _embedding_of(name, host)
        require_unsplit(embedding, dotted(name, embedding_name))
        names = get_arg_names_inside_func(type(host).forward)
        expand, count = self.other_expand_ids, self.soft_token_num
        layer = SoftPromptLayer(self._initial(embedding), embedding_name, names, expand)
        companion: Companion | None = None
        if "inputs_embeds" in names:
            self.insert_action(host, layer, LAYER, BeforeDispatcher, prepend)
        else:
            companion = Companion(count, names, expand)
            self.insert_module(host, "before", companion, "soft_prompt_companion")
            self.insert_action(embedding, layer, LAYER, BeforeDispatcher, stand_in)
            self.insert_action(embedding, layer, LAYER, AfterDispatcher, fill_in)
        whole, _, leaf = name.rpartition(".")
        decoder = sites.get(dotted(whole, "decoder")) if leaf == "encoder" else None
        around = [sites[n] for n in ("", *reversed(lineage(name)))]
        outermost = next((m for m in around if hasattr(m, "get_input_embeddings")), host)
        if decoder is not None:
            self.insert_module(decoder, "before", CrossMask(count), "soft_prompt_mask")
            if self.trim_output:
                cut = TrimEncoder(count)
                self.insert_action(
                    outermost, cut, "soft_prompt_trim", AfterDispatcher, trim_encoder
                )
        elif self.trim_output or host is not outermost:
            if companion is None:
                self.insert_action(host, layer, LAYER, AfterDispatcher, trim)
            else:
                name = "soft_prompt_companion"
                self.insert_action(host, companion, name, AfterDispatcher, trim)

    def _initial(self, embedding: Any) -> Tensor:
        if any(map(is_dtensor, embedding._parameters.values())):
            raise InsertionError(
                "The token embedding is sharded already, and a soft prompt needs it before the "
                "engine gathers it. Construct the prompt first, then let FSDP2 shard the backbone."
            )
        count, (vocabulary, width) = self.soft_token_num, self.widths(embedding)
        if not self.token_init:
            return torch.empty(count, width).uniform_(-self.init_range, self.init_range)
        if count > vocabulary:
            raise ConfigError(
                f"soft_token_num={count} exceeds the vocabulary of {vocabulary}: a prompt made "
                "from token embeddings can be no longer; pass token_init=False."
            )
        if torch.empty(0).is_meta:  # it is looked at alone
            return torch.empty(count, width)
        ids = torch.arange(count, device=next(embedding.parameters()).device)
        with within(torch.no_grad(), gathered(embedding.parameters())):
            embeds: Tensor = embedding.forward(ids)  # may scale them; a delta on it takes no part
        return embeds.clone()

    def translate_keys(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accept 0.3.2's files, whose prompt is always at the outermost model."""
        old, own = dotted(LAYER, "soft_embeds"), next(iter(self.own_tensors()))[0]
        if own.endswith(old) and own not in tensors:
            tensors = {own if name == old else name: t for name, t in tensors.items()}
        return tensors


def _prompted(backbone: nn.Module) -> tuple[str, Any]:
    """(name, module) of the outermost model that embeds ids, its encoder if that does."""
    names = {id(module): name for name, module in own_modules(backbone)}
    for name, module in own_modules(backbone):
        inner: Any = module
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            encoder = inner.get_encoder() if hasattr(inner, "get_encoder") else None
            if encoder is not None and _input_embedding(encoder) is not None:
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


def _base_of_id_reader(host: nn.Module) -> str:
    """Name of the base model in a model that reads the ids before it hands them on, else "".

    Some look for the last token that is no padding: with embeddings in place of ids they take the
    last position, padding or not. Others flatten ids of shape (batch, choices, tokens).
    """
    names, base = names_in_code(type(host).forward), getattr(host, "base_model_prefix", "")
    reads = {"pad_token_id", "argmax"} <= names or "num_choices" in names
    return base if reads and isinstance(host._modules.get(base), nn.Module) else ""


def _embedding_of(name: str, host: Any) -> tuple[str, Any]:
    """(name below the host, module) of the host's token embedding.

    It is what `get_input_embeddings` returns, else the first embedding that is not named after
    positions or types.
    """
    found = [(n, m) for n, m in own_modules(host) if is_embedding(m)]
    wanted = _input_embedding(host)
    if wanted is not None:
        found = [(n, m) for n, m in found if m is wanted]
    elif getattr(host, "main_input_name", "input_ids") != "input_ids":
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
