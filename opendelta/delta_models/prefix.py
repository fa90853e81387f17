"""Prefix tuning: trained keys and values before the text (Li & Liang 2021).

https://arxiv.org/abs/2101.00190. The prefix joins at transformers' attention lookup
(`opendelta.delta_models.lookup_attention`); attention that is computed inline is served by
`opendelta.delta_models.inline_attention`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.backends.bmt import has_distributed
from opendelta.backends.sharding import reshard
from opendelta.delta.plan import Plan
from opendelta.delta.record import record_of
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.attention_hosts import (
    SIGNS_OF_ATTENTION,
    attention_in,
    looks_attention_up,
    names_of_code,
    no_attention,
    relative_bias_for,
)
from opendelta.delta_models.attention_widths import measured_widths
from opendelta.delta_models.generated import Generated
from opendelta.delta_models.prefix_layer import (
    PrefixLayer,
    ReparameterizationNetwork,
    enter,
    idle,
    leave,
)
from opendelta.exceptions import CheckpointError, ConfigError, InsertionError
from opendelta.ground.blocks import within
from opendelta.ground.names import dotted
from opendelta.ground.widths import read_widths
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.dispatch import BeforeDispatcher
from opendelta.mechanism.ownership import own_modules


class PrefixConfig(BaseDeltaConfig):
    """Config of `PrefixModel`; its fields are that constructor's arguments."""


@register
class PrefixModel(Generated):
    """Trained keys and values before those of the text, in attention modules.

    The prefix comes before the text with nothing else shifted: positions stay, every token sees
    it, and it is never cached. Relative position biases (T5) treat it as the tokens right before
    the text.

    Args:
        backbone_model: the model to modify, in place.
        prefix_token_num: length of the prefix.
        reparameterize: whether a network generates the prefixes while training; saving keeps
            what it generates (see `save_finetuned`).
        embed_dim: width of the network's input.
        mid_dim: width of the network's hidden layer.
        modified_modules: see `DeltaBase`, also for the arguments that follow; each must be an
            attention module, and any choice of layers is fine. None for every attention.

    Raises:
        InsertionError: if a target computes no attention that a prefix can join.
        ConfigError: for a length or width below 1.
    """

    delta_type: ClassVar[str] = "prefix"
    config_class = PrefixConfig
    default_modified_modules: ClassVar[list[str]] = ["attn"]

    def __init__(
        self,
        backbone_model: nn.Module,
        prefix_token_num: int = 6,
        reparameterize: bool = True,
        embed_dim: int = 512,
        mid_dim: int = 512,
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        *,
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        self._construct()

    # --- construction -----------------------------------------------------------------------

    def plan_targets(self, plan: Plan, patterns: list[str]) -> None:
        """Put a prefix on every target; the network sits on the first."""
        backbone = plan.backbone
        if has_distributed(backbone):
            raise ConfigError(
                "Prefix tuning does not run on BMTrain; LoRA, the adapters, BitFit and soft "
                "prompts do."
            )
        for name in ("prefix_token_num", "embed_dim", "mid_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 1 or more.")
        addressed = {name for hits in self.find_targets(patterns) for name in hits}
        hosts: dict[str, nn.Module] = {}
        first: nn.Module | None = None  # where the network sits: what a pattern addresses
        for name, module in own_modules(backbone):
            if name in addressed:
                inner, host = attention_in(name, module)
                if names_of_code(host) & SIGNS_OF_ATTENTION:
                    hosts.setdefault(inner, host)
                    first = module if first is None else first
                elif not self.uses_defaults:  # these hold state-space and other mixers too
                    raise no_attention(name, module)
        if not hosts:
            raise InsertionError(
                f"{type(backbone).__name__} has no attention module that a prefix can join: "
                "choose another method."
            )
        widths = self.attention_widths(hosts)
        network = None
        if self.reparameterize:
            total = sum(sum(pair) for pair in widths.values())
            network = ReparameterizationNetwork(
                self.prefix_token_num, self.embed_dim, self.mid_dim, total
            )
        start = 0
        for name, host in hosts.items():
            layer = PrefixLayer(
                self.prefix_token_num,
                widths[name],
                network,
                start,
                inline=not looks_attention_up(host),
                relative=relative_bias_for(backbone, name),
            )
            start += sum(widths[name])
            plan.insert(host, layer, "prefix", BeforeDispatcher, enter)
            plan.at_end(host, leave)
            if network is not None and first is not None:
                plan.insert(first, network, "reparams", BeforeDispatcher, idle)
                first = None

    def attention_widths(self, hosts: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
        """(key width, value width) of each attention, all heads together.

        Read off its projections where the common structure knows them and keys and values are
        plainly what they give, else measured by a forward.
        """
        read: dict[str, tuple[int, int]] = {}
        unsure: dict[str, nn.Module] = {}
        for name, host in hosts.items():
            widths, plain = self._projected_widths(name)
            if widths is not None:
                read[name] = widths
            if widths is None or (not plain and looks_attention_up(host)):
                unsure[name] = host
        if unsure:
            try:
                measured = measured_widths(self.backbone_model, unsure)
                for name in unsure.keys() - measured.keys():
                    raise no_attention(name, unsure[name])
                read |= measured
            except InsertionError:
                if not unsure.keys() <= read.keys():
                    raise
        return read

    def _projected_widths(self, name: str) -> tuple[tuple[int, int] | None, bool]:
        """Widths by the projections in the module called `name`, and whether these are plain.

        In latent attention keys get more from elsewhere than one projection gives.
        """
        parts: dict[str, str] = {}  # role -> projection
        units: set[str] = set()
        for part_name, _ in self.plan.targeting.named_inside(name):
            for common in self.plan.targeting.common_names_of(part_name):
                unit, _, role = common.rpartition(".")
                parts.setdefault(role, part_name)
                units |= {unit} if role == "k" else set()
        if len(units) > 1:
            raise InsertionError(
                f"{name!r} holds {len(units)} attention modules ({', '.join(sorted(units))}); a "
                "prefix goes on one: name them one by one."
            )
        out = {
            role: widths
            for role in ("k", "v", "proj")
            if role in parts
            and (widths := read_widths(self.backbone_model.get_submodule(parts[role])))
        }
        if "k" not in out or "v" not in out:
            return None, False
        key, value = out["k"][1], out["v"][1]
        if parts["k"] != parts["v"]:
            return (key, value), key == value
        if parts["k"] != parts.get("q"):
            return (key // 2, key // 2), False
        if "proj" not in out:
            return None, False
        rest = (key - out["proj"][0]) // 2  # all in one: as wide as queries, keys, values
        return (rest, rest), True

    # --- files ------------------------------------------------------------------------------

    @property
    def prefixes(self) -> dict[str, PrefixLayer]:
        """The prefix of each attention by its name in files."""
        return {
            dotted(i.host_name, i.file_name): i.module
            for i in self.insertions
            if isinstance(i.module, PrefixLayer)
        }

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What is saved: the generated prefixes, or the network that generates them."""
        tensors = super().checkpoint_tensors()
        if not self.reparameterize or self._saves_network:
            return tensors
        network = {id(p) for layer in self.prefixes.values() for p in layer.network_parameters()}
        own = {name for name, tensor in self.own_tensors() if id(tensor) in network}
        generated = {}
        with within(torch.no_grad()):
            for name, layer in self.prefixes.items():
                generated[f"{name}.past_key"], generated[f"{name}.past_value"] = layer()
        reshard(self.backbone_model)  # the network ran, and no backward follows
        return generated | {name: t for name, t in tensors.items() if name not in own}

    def loading_targets(
        self, tensors: dict[str, Tensor], changes: Changes
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Prefixes, or the network that generates them, whichever the file and this delta hold.

        A file of prefixes takes the place of a network that generates them.
        """
        names = [f"{name}.{part}" for name in self.prefixes for part in ("past_key", "past_value")]
        if not self.reparameterize or not all(name in tensors for name in names):
            return super().loading_targets(tensors, changes)
        insertion = self._network_insertion
        insertion.leave(changes)
        own: dict[str, Tensor] = {}
        for name, layer in self.prefixes.items():
            changes.set(layer, network=[None])
            for part, width in zip(("past_key", "past_value"), layer.widths, strict=True):
                like = next(insertion.module.parameters())
                shape, at = (layer.tokens, width), {"device": like.device, "dtype": like.dtype}
                p = nn.Parameter(torch.empty(shape, **at))  # plain, also where the network is not
                p._is_delta = True  # type: ignore[attr-defined]
                own[f"{name}.{part}"] = changes.of(layer._parameters)[part] = p
        node = self.get_submodule(insertion.host_name)
        changes.of(node._modules).pop(insertion.file_name)
        record = record_of(self)
        left = [other for other in changes.get(record, "insertions") if other is not insertion]
        changes.set(record, insertions=left)
        changes.set(self.config, reparameterize=False)
        return own, self.translate_keys(tensors)

    def translate_keys(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accept a network where this delta holds prefixes, and where another release had it.

        Raises:
            CheckpointError: if the file's network is not whole.
        """
        tensors = {n: t for n, t in tensors.items() if not n.endswith("reparams.input_tokens")}
        names = [name for name in tensors if ".reparams." in f".{name}"]
        if names and not self.reparameterize:
            return self._generated(tensors, names)
        if names:
            insertion = self._network_insertion
            home = dotted(insertion.host_name, insertion.file_name)
            there = {n: f"{home}.{n.rpartition('reparams.')[2]}" for n in names}
            tensors = {there.get(name, name): tensor for name, tensor in tensors.items()}
        return tensors

    def _generated(self, tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """The prefixes that a network in a file generates."""
        by_end = {name.rpartition("reparams.")[2]: tensors[name] for name in names}
        try:
            wte, first = by_end["wte.weight"], by_end["control_trans.0.weight"]
            last = by_end["control_trans.2.weight"]
            tokens, embed_dim = wte.shape
            network = ReparameterizationNetwork(tokens, embed_dim, first.shape[0], last.shape[0])
            network.load_state_dict(by_end)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"The file's prefix network is not whole: {error}") from error
        result = {name: t for name, t in tensors.items() if name not in names}
        start = 0
        with within(torch.no_grad()):
            for name, layer in self.prefixes.items():
                middle, stop = start + layer.widths[0], start + sum(layer.widths)
                result[f"{name}.past_key"] = network(start, middle)
                result[f"{name}.past_value"] = network(middle, stop)
                start = stop
        return result

    @property
    def _network_insertion(self) -> Any:
        brings = (i for i in self.insertions if isinstance(i.module, ReparameterizationNetwork))
        return next(brings, None)
