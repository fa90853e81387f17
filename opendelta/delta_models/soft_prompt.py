"""Soft prompts: trained vectors before the token embeddings (Lester et al. 2021).

https://arxiv.org/abs/2104.08691.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import gathered, is_dtensor
from opendelta.basemodel import DeltaBase
from opendelta.delta.plan import Plan
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import ConfigError, InsertionError
from opendelta.ground.containers import Args, Kwargs, first_hidden
from opendelta.ground.names import dotted, lineage, words
from opendelta.ground.widths import is_embedding
from opendelta.mechanism.dispatch import AfterDispatcher, BeforeDispatcher
from opendelta.mechanism.engines import require_unsplit
from opendelta.mechanism.ownership import own_modules
from opendelta.signature import get_arg_names_inside_func, names_in_code

ROOT, LAYER = "root", "soft_prompt_layer"
PROMPT_ID = -1  # stands for a position of the prompt among ids
IGNORED_LABEL = -100  # what transformers' and torch's losses leave out
_NO_TOKENS = {"pos", "position", "positional", "positions", "type", "segment", "relative"}
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


# --- a model that takes embeddings ----------------------------------------------------------------


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


# --- a model that takes ids alone -----------------------------------------------------------------


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


# --- both -----------------------------------------------------------------------------------------


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


def cached_positions(given: Kwargs) -> int:
    """How many positions the cache among a model's arguments holds, prompt included.

    A recurrent state does not count them: 1 stands for any number.
    """
    for name in ("past_key_values", "cache_params", "state", "mems"):
        cache = given.get(name)
        if cache is None:
            continue
        if getattr(cache, "is_linear", None) and all(cache.is_linear):
            return int(cache.has_previous_state())
        return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 1
    return 0


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
        with torch.no_grad(), gathered(embedding.parameters()):
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
