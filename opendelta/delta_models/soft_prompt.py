"""Soft prompts: trained vectors before the token embeddings (Lester et al. 2021).

https://arxiv.org/abs/2104.08691.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import gathered, is_dtensor, reshard
from opendelta.delta.plan import Plan
from opendelta.delta.record import record_of
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.peft_prompt import PeftPrompt
from opendelta.delta_models.prompt_entrance import Entrance, FillIn, stand_in
from opendelta.delta_models.prompt_layer import (
    LAYER,
    NETWORK,
    PROMPT,
    FurtherSite,
    Site,
    SoftPromptLayer,
)
from opendelta.delta_models.prompt_network import KINDS, PromptNetwork, network_in
from opendelta.delta_models.prompt_sites import cut, cut_features, enter, enter_features, hold
from opendelta.delta_models.prompt_way import require_tensor, way_into
from opendelta.delta_models.prompted_call import leave
from opendelta.delta_models.prompted_models import (
    argument_names,
    base_of,
    decoder_beside,
    embedding_of,
    prompted_model,
    room_of,
)
from opendelta.delta_models.prompted_pair import CrossMask, TrimEncoder, trim_encoder
from opendelta.exceptions import CheckpointError, ConfigError, InsertionError
from opendelta.ground.blocks import within
from opendelta.ground.names import dotted, lineage
from opendelta.mechanism.backbone_state import deltas
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.dispatch import AfterDispatcher, BeforeDispatcher
from opendelta.mechanism.engines import require_unsplit
from opendelta.mechanism.ownership import own_modules

ROOT = "root"


class SoftPromptConfig(BaseDeltaConfig):
    """Config of `SoftPromptModel`; its fields are that constructor's arguments."""


@register
class SoftPromptModel(PeftPrompt):
    """Trained vectors before the token embeddings; encoder-decoders get them in the encoder.

    What a model returns for each position it returns for the prompt's too, in front. Where the
    prompt sits in a model inside (the base model of decoders that classify sequences, which look
    for padding among the ids, and of multiple choice; the text model of CLIP; Whisper's decoder),
    the output of that one is cut to the text.

    Args:
        backbone_model: the model to modify, in place.
        soft_token_num: length of the prompt.
        init_range: a random prompt is uniform in ``[-init_range, init_range]``.
        token_init: start from the embeddings of the first tokens of the vocabulary instead, or,
            ``"sampled"``, of tokens drawn from it.
        other_expand_ids: arguments of shape (batch, tokens) or (batch, tokens, ...) that must be
            as long as the input (``bbox``), and their value at the prompt. The caller's tensors
            are not changed. ``position_ids`` and ``labels`` follow by themselves, labels with -100.
        modified_modules: the model whose input is prompted, where it is not to be found by
            itself (``"root"`` is the backbone).
        exclude_modules: see `DeltaBase`, also for the arguments that follow.
        trim_output: cut the returned sequences to the text, without the prompt's positions.
            Attention weights stay whole; of an encoder-decoder the returned states of the encoder
            are cut.
        init_text: start from the embeddings of this text, whatever `token_init` says: a string,
            which `tokenizer` turns into ids, or ids. A longer text is cut to the prompt, a shorter
            one repeated. The config holds the ids.
        tokenizer: called with `init_text`; nothing of it is kept.
        reparameterize: ``"mlp"`` or ``"lstm"`` for a network that generates the prompt while
            training (P-tuning); saving keeps what it generates (see `save_finetuned`).
        mid_dim: width of that network's hidden layers.

    Raises:
        InsertionError: if no token embedding is found, `modified_modules` names several models, or
            the model can be prompted neither by embeddings nor in the place of ids.
        ConfigError: for a length below 1, or above the vocabulary with `token_init`; for a text
            without a tokenizer, or of no tokens.
    """

    delta_type: ClassVar[str] = "soft_prompt"
    config_class = SoftPromptConfig
    default_modified_modules: ClassVar[list[str]] = [ROOT]

    def __init__(
        self,
        backbone_model: nn.Module,
        soft_token_num: int = 100,
        init_range: float = 0.5,
        token_init: bool | str = True,
        other_expand_ids: dict[str, int] = {"attention_mask": 1, "token_type_ids": 0},  # noqa: B006
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        *,
        trim_output: bool = False,
        init_text: str | list[int] | None = None,
        tokenizer: Any = None,
        reparameterize: bool | str = False,
        mid_dim: int = 128,
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
        if self.reparameterize not in (False, *KINDS):
            raise ConfigError(
                f"reparameterize={self.reparameterize!r}; expected False, or the kind of network "
                f"that generates the prompt: {' or '.join(map(repr, KINDS))}."
            )
        if self.mid_dim < 1:
            raise ConfigError(f"mid_dim={self.mid_dim}; expected 1 or more.")
        if list(patterns) == [ROOT]:
            name, host = prompted_model(backbone)
        else:
            name, *others = [n for hits in self.find_targets(patterns) for n in hits]
            if others:
                raise InsertionError(
                    f"modified_modules={list(patterns)} names {[name, *others]}; a soft prompt "
                    "goes before the input of one model."
                )
            host = backbone.get_submodule(name)
        self._put(plan, name, host)

    def _put(self, plan: Plan, name: str, home: Any) -> None:
        """Put the prompt on the model called `name`, and what it needs around and inside it."""
        modules: dict[str, Any] = dict(own_modules(plan.backbone))
        embedding_name, embedding = embedding_of(name, home)
        require_unsplit(embedding, dotted(name, embedding_name))
        base, reads_ids = base_of(home, embedding_name)
        inside = embedding_name.removeprefix(base + ".")
        host = modules[dotted(name, base)] if reads_ids else home
        prompt_id, initial = _free_id(plan.backbone), self._initial(embedding)
        start: Tensor | PromptNetwork = initial
        if self.reparameterize:
            start = PromptNetwork(initial, str(self.reparameterize), self.mid_dim)
        way = way_into(plan.backbone, host, embedding, argument_names(host), prompt_id)
        around = [modules[n] for n in ("", *reversed(lineage(name)))]
        outermost = next((m for m in around if hasattr(m, "get_input_embeddings")), home)
        decoder = decoder_beside(around, home)
        layer = SoftPromptLayer(
            start,
            self.other_expand_ids,
            prompt_id,
            room_of(home),
            way.counts_positions,
            names=argument_names(home),
            embedding=embedding_name if way.by_embeddings else None,
            # A decoder looks at all that its encoder gives.
            cuts=decoder is None and (self.trim_output or home is not outermost),
        )
        if reads_ids:  # what it looks for among the ids is to be where it is
            self.insert_action(home, layer, LAYER, BeforeDispatcher, hold)
        else:
            self._put_site(plan, home, layer, LAYER)
        if base:
            inner = modules[dotted(name, base)]
            takes = way.by_embeddings and "inputs_embeds" in argument_names(inner)
            further = FurtherSite(
                layer,
                home,
                names=argument_names(inner),
                embedding=inside if takes else None,
                cuts=reads_ids or layer.cuts,
                is_spare=not reads_ids,
            )
            self._put_site(plan, inner, further, "soft_prompt_site")
        wrapper = modules[name.rpartition(".")[0]]
        if name and not hasattr(wrapper, "get_input_embeddings"):
            further = FurtherSite(layer, home, names=[], embedding=None, cuts=True)
            of_features = enter_features, cut_features
            self._put_site(plan, wrapper, further, "soft_prompt_site", of_features)
        entrance = Entrance(layer, home, not way.by_embeddings, is_shared=decoder is not None)
        name = "soft_prompt_entrance"
        self.insert_action(embedding, entrance, name, BeforeDispatcher, stand_in)
        plan.at_end(embedding, FillIn(entrance))
        if decoder is None:
            return
        self.insert_module(
            decoder, "before", CrossMask(layer.count, argument_names(decoder)), "soft_prompt_mask"
        )
        if self.trim_output:
            trim = TrimEncoder(layer.count)
            self.insert_action(outermost, trim, "soft_prompt_trim", AfterDispatcher, trim_encoder)

    def _put_site(
        self,
        plan: Plan,
        host: nn.Module,
        site: Site,
        name: str,
        actions: tuple[Any, Any] = (enter, cut),
    ) -> None:
        self.insert_action(host, site, name, BeforeDispatcher, actions[0])
        self.insert_action(host, site, name, AfterDispatcher, actions[1])
        plan.at_end(host, leave)

    def _initial(self, embedding: Any) -> Tensor:
        if any(map(is_dtensor, embedding._parameters.values())):
            raise InsertionError(
                "The token embedding is sharded already, and a soft prompt needs it before the "
                "engine gathers it. Construct the prompt first, then let FSDP2 shard the backbone."
            )
        count, (vocabulary, width) = self.soft_token_num, self.widths(embedding)
        ids = self._first_ids(count, vocabulary)
        if ids is None:
            return torch.empty(count, width).uniform_(-self.init_range, self.init_range)
        if torch.empty(0).is_meta:  # it is looked at alone
            return torch.empty(count, width)
        ids = ids.to(next(embedding.parameters()).device)
        with within(torch.no_grad(), gathered(embedding.parameters())):
            embeds = embedding.forward(ids)  # may scale them; a delta on it takes no part
        return require_tensor(embedding, embeds).clone()

    def _first_ids(self, count: int, vocabulary: int) -> Tensor | None:
        """The tokens whose embeddings the prompt starts from, None for random numbers."""
        tokenizer = record_of(self).helpers.get("tokenizer")
        if tokenizer is not None and not (callable(tokenizer) and self.init_text is not None):
            raise ConfigError(
                f"tokenizer={tokenizer!r:.60}: expected the tokenizer itself, for init_text=...; "
                "nothing else uses it."
            )
        if self.init_text is not None:
            ids = self.init_text
            if isinstance(ids, str):
                if tokenizer is None:
                    raise ConfigError(
                        f"init_text={ids!r:.60} needs the model's tokenizer: pass tokenizer=..., "
                        "or the text's ids in its place."
                    )
                ids = tokenizer(ids, add_special_tokens=False)["input_ids"]
            if not ids or not 0 <= min(ids) <= max(ids) < vocabulary:
                raise ConfigError(
                    f"init_text comes to the ids {list(ids)!r:.80}; expected one or more below the "
                    f"vocabulary's size, {vocabulary}."
                )
            self.become(init_text=list(ids))
            return torch.tensor(list(ids) * -(-count // len(ids)), device="cpu")[:count]
        if self.token_init == "sampled":
            return torch.randint(vocabulary, (count,), device="cpu")
        if isinstance(self.token_init, str):
            raise ConfigError(
                f"token_init={self.token_init!r}; expected True (the first tokens), False (random "
                'numbers) or "sampled".'
            )
        if not self.token_init:
            return None
        if count > vocabulary:
            raise ConfigError(
                f"soft_token_num={count} exceeds the vocabulary of {vocabulary}: a prompt made "
                "from token embeddings can be no longer; pass token_init=False."
            )
        return torch.arange(count, device="cpu")

    # --- files ------------------------------------------------------------------------------

    @property
    def _layer(self) -> tuple[str, SoftPromptLayer]:
        """The prompt by its name in files."""
        return next(
            (dotted(i.host_name, i.file_name), i.module)
            for i in self.insertions
            if isinstance(i.module, SoftPromptLayer)
        )

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What is saved: the prompt, or the network that generates it."""
        tensors, (name, layer) = super().checkpoint_tensors(), self._layer
        if layer.network is None or self._saves_network:
            return tensors
        with within(torch.no_grad()):
            prompt = {dotted(name, PROMPT): layer.values()}
        reshard(self.backbone_model)  # the network ran, and no backward follows
        own = dotted(name, NETWORK) + "."
        return prompt | {n: t for n, t in tensors.items() if not n.startswith(own)}

    def loading_targets(
        self, tensors: dict[str, Tensor], changes: Changes
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The prompt, or the network that generates it, whichever the file holds.

        A file of a prompt takes the place of a network.
        """
        (name, layer), tensors = self._layer, self.translate_keys(tensors)
        if layer.network is None or dotted(name, PROMPT) not in tensors:
            return dict(self.own_tensors()), tensors
        like = layer.network.embedding.weight
        p = nn.Parameter(torch.empty_like(like, requires_grad=True))
        p._is_delta = True  # type: ignore[attr-defined]
        changes.of(layer._modules).pop(NETWORK)
        changes.set(layer, network=None)
        changes.of(layer._parameters)[PROMPT] = p
        changes.set(self.config, reparameterize=False)
        rest = ((n, t) for n, t in self.own_tensors() if not n.startswith(dotted(name, NETWORK)))
        return {**dict(rest), dotted(name, PROMPT): p}, tensors

    def translate_keys(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accept files whose prompt is at another model (0.3.2's, 1.0's), and one's network.

        Raises:
            CheckpointError: if the file's network is not whole.
        """
        name, layer = self._layer
        there = {n.rpartition(f"{LAYER}.")[2]: n for n in tensors if f".{LAYER}." in f".{n}"}
        tensors = {n: t for n, t in tensors.items() if n not in there.values()} | {
            dotted(name, end): tensors[n] for end, n in there.items()
        }
        network = {n: n.partition(".")[2] for n in there if n.startswith(NETWORK + ".")}
        if not network or layer.network is not None:
            return tensors
        found = {inner: tensors.pop(dotted(name, n)) for n, inner in network.items()}
        try:
            with within(torch.no_grad()):
                tensors[dotted(name, PROMPT)] = network_in(found)()
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"The file's prompt network is not whole: {error}") from error
        return tensors


def _free_id(backbone: nn.Module) -> int:
    """What stands for a prompt among ids, other than for any prompt that is there already."""
    there = (i.module for delta in deltas(backbone) for i in delta.insertions)
    taken = {getattr(module, "prompt_id", 0) for module in there}
    return next(-n for n in range(1, len(taken) + 2) if -n not in taken)
