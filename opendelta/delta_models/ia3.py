"""(IA)³: features scaled by learned vectors (Liu et al. 2022, https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.addressing.patterns import as_patterns, matches, matches_any
from opendelta.basemodel import DeltaBase
from opendelta.delta.plan import Plan
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.fused_slices import fused_slices
from opendelta.delta_models.host_kinds import (
    Embedding,
    HostKind,
    host_kind,
    layers_of,
    require_kind,
)
from opendelta.delta_models.peft_form import Layers, PeftForm, peft_targets
from opendelta.exceptions import AddressingError, ConfigError, InsertionError, nearest
from opendelta.ground.names import leaf_of
from opendelta.mechanism.dispatch import AfterDispatcher, BeforeDispatcher, after, before
from opendelta.mechanism.insertion import ModuleInsertion
from opendelta.saving.peft_files import Fields, PeftConfig, patterns


class IA3Layer(nn.Module):
    """``hidden * scale``, along the features.

    Parameter: `scale` (features,), ones at first; of a part of the features, (those,).

    Args:
        kind: the kind of the host.
        on_input: whether the host's input is scaled, not its output.
        features: positions of those that are scaled; None for all.
    """

    features: Tensor | None

    def __init__(
        self, kind: HostKind, on_input: bool = False, features: Tensor | None = None
    ) -> None:
        super().__init__()
        self.kind, self.on_input = kind, on_input
        self.width = kind.width_in if on_input else kind.width_out
        self.register_buffer("features", features, persistent=False)
        self.scale = nn.Parameter(torch.ones(self.width if features is None else len(features)))

    def extra_repr(self) -> str:
        return f"on_input={self.on_input}"

    def full(self) -> Tensor:
        """The factor of every feature, (width,)."""
        if self.features is None:
            return self.scale
        return self.scale.new_ones(self.width).index_copy(0, self.features, self.scale)

    def forward(self, hidden: Tensor) -> Tensor:
        """The input or the output of the host, scaled; it keeps its shape and dtype."""
        return (hidden * self.kind.along_features(self.full(), hidden)).to(hidden.dtype)


class IA3Config(BaseDeltaConfig):
    """Config of `IA3Model`; its fields are that constructor's arguments."""


@register
class IA3Model(PeftForm):
    """Scales the features that linears and convolutions return, or those that they are given.

    By default keys and values, and what the last linear of each feed-forward is given. In a fused
    projection that a common name addresses (``attn.k``), its part alone is scaled: which features
    those are is seen in one forward of a pseudo input. Biases are scaled with the output. A module
    that holds others stands for all linears inside it.

    Args:
        backbone_model: the model to modify, in place.
        on_input: patterns of those among the modified modules whose input is scaled, not their
            output; None for the last linears of feed-forwards (``ff.w2``), however addressed.
        modified_modules: see `DeltaBase`, also for the arguments that follow.

    Raises:
        InsertionError: if a target is neither a linear nor a convolution, or a part of its features
            is addressed and cannot be told.
        AddressingError: if a pattern of `on_input` addresses none of the modified modules.
    """

    title: ClassVar[str] = "(IA)³"
    delta_type: ClassVar[str] = "ia3"
    peft_types: ClassVar[tuple[str, ...]] = ("IA3",)
    peft_key: ClassVar[re.Pattern[str]] = re.compile(r"(.+)\.(ia3_l)")
    peft_fields: ClassVar[Fields] = {"feedforward_modules": ([], (list, str))}
    peft_immaterial: ClassVar[frozenset[str]] = frozenset({"init_ia3_weights"})
    config_class = IA3Config
    default_modified_modules: ClassVar[list[str]] = ["attn.k", "attn.v", "ff.w2"]

    _parts: dict[str, set[str]] | None = None
    _slices: dict[str, dict[str, Tensor]] | None = None

    def __init__(
        self,
        backbone_model: nn.Module,
        on_input: list[str] | tuple[str, ...] | str | None = None,
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
        *,
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        self._construct()

    def default_targets(self, structure: CommonStructureMap) -> list[list[str]]:
        """Those of the default places that are linears or convolutions."""
        modules = dict(self.plan.targeting.own)
        found = [structure.addressed(role) for role in self.default_modified_modules]
        return [[n for n in hits if host_kind(modules[n])] for hits in found]

    def plan_targets(self, plan: Plan, patterns: list[str]) -> None:
        names = {name for hits in self.find_targets(patterns) for name in hits}
        for pattern in as_patterns(self.on_input, "on_input"):
            if not any(matches_any(plan.targeting.names_of(name), pattern) for name in names):
                raise AddressingError(
                    f"on_input: {pattern!r} addresses none of the modified modules."
                    + nearest(pattern, [*names, *map(leaf_of, names)])
                )
        parts = {name: self._addressed_parts(name) for name in names}
        self._parts = {name: part for name, part in parts.items() if part}
        hosts = {name: plan.backbone.get_submodule(name) for name in self._parts}
        self._slices = fused_slices(plan.backbone, hosts) if hosts else {}
        super().plan_targets(plan, patterns)
        self._parts = self._slices = None

    def update_module(self, module: nn.Module, key: str) -> None:
        """Scale the output of the module called `key`, or its input, or those of linears in it."""
        for name, target in layers_of(self.plan, key, self.title).items():
            kind = require_kind(target, name, self.title)
            if isinstance(kind, Embedding):
                raise InsertionError(
                    f"{name!r} is an embedding ({type(target).__name__}): (IA)³ goes on linears "
                    "and convolutions. Leave it out with exclude_modules."
                )
            if self.plan.on(target):
                continue
            if self._is_on_input(name):
                self.insert_action(target, IA3Layer(kind, True), "ia3", BeforeDispatcher, before)
                continue
            features = None
            if self._parts and self._slices and name in self._parts:
                found = [self._slices[name][letter] for letter in sorted(self._parts[name])]
                features = torch.cat(found).sort().values
            layer = IA3Layer(kind, features=features)
            self.insert_action(target, layer, "ia3", AfterDispatcher, after)

    def _is_on_input(self, name: str) -> bool:
        if self.on_input is None:
            return matches_any(self.plan.targeting.structure.everywhere.names(name), "ff.w2")
        names = tuple(self.plan.targeting.names_of(name))
        return any(matches_any(names, p) for p in as_patterns(self.on_input, "on_input"))

    def _addressed_parts(self, name: str) -> set[str]:
        """The parts (q, k, v) of a fused projection that are addressed; empty for the whole."""
        if not self.common_structure or self._is_on_input(name):
            return set()
        played: set[str] = set()
        addressed: set[str] = set()
        for pattern in self.modified_modules:
            structure, rest = self.plan.targeting.structure.scoped(pattern)
            names = structure.names(name)
            played |= {leaf_of(common) for common in names}
            addressed |= {leaf_of(common) for common in names if matches(common, rest)}
        if not addressed or addressed == played:
            return set()
        if not played <= {"q", "k", "v"}:
            raise InsertionError(
                f"{name!r} is {' and '.join(sorted(played))} in one, of which only "
                f"{' and '.join(sorted(addressed))} is addressed: address all of them, or leave it "
                "out with exclude_modules."
            )
        return addressed

    def folds(self, insertion: Any) -> dict[str, Tensor]:
        """Rows of W and the bias times the scale of the output, or columns of W of the input."""
        layer, host = insertion.module, insertion.host
        kind, scale = layer.kind, layer.full().detach().to(host.weight)
        weight = host.weight.detach().clone()
        rows = kind.rows(weight)
        if not layer.on_input:
            rows.mul_(scale.unsqueeze(1))
            bias = getattr(host, "bias", None)
            return {"weight": weight} | ({} if bias is None else {"bias": bias.detach() * scale})
        groups = getattr(kind, "groups", 1)  # those of a convolution see a share of the input each
        by_group = rows.view(groups, len(rows) // groups, layer.width // groups, -1)
        by_group.mul_(scale.view(groups, 1, -1, 1))
        return {"weight": weight}

    def combined_tensors(
        self, deltas: Sequence[DeltaBase], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """What the scales differ from one by is summed."""
        sums = super().combined_tensors(deltas, weights)
        return {name: tensor + (1 - sum(weights)) for name, tensor in sums.items()}

    # --- PEFT -------------------------------------------------------------------------------

    def peft_layers(
        self, layers: Mapping[str, ModuleInsertion], others: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Scales with a one for every feature that is not scaled, and PEFT's list of inputs."""
        tensors = {}
        on_input = [name for name, i in layers.items() if i.module.on_input]
        for name, insertion in layers.items():
            layer: Any = insertion.module
            kernel = getattr(insertion.host, "kernel_size", ())
            if len(kernel) == 1:
                raise ConfigError(
                    f"{name!r} is a convolution of one dimension, on which PEFT has no (IA)³. "
                    "Leave it out with exclude_modules."
                )
            on_a_row = name in on_input or kernel
            shape = (1, -1, *(1 for _ in kernel)) if on_a_row else (-1, 1)
            tensors[f"{name}.ia3_l"] = layer.full().detach().reshape(shape)
        targets = peft_targets(list(layers), others)
        inputs: Any = peft_targets(on_input, [*others, *(n for n in layers if n not in on_input)])
        # PEFT finds these by the bare ends of names, and wants each to be one of the targets.
        strays = [n for n in layers if n not in on_input and n.endswith(tuple(inputs))]
        if isinstance(inputs, list) and (strays or not set(inputs) <= set(targets)):
            inputs = "|".join(map(re.escape, on_input))
        return tensors, {"feedforward_modules": inputs if on_input else []}

    @classmethod
    def layers_from_peft(
        cls,
        config: PeftConfig,
        settings: dict[str, Any],
        layers: Layers,
        modules: dict[str, nn.Module],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said = settings["feedforward_modules"]
        if isinstance(said, str):
            whole = config.expression("feedforward_modules", said)
            on_input = [host for host in layers if whole.fullmatch(host)]
        elif all(isinstance(end, str) for end in said):
            on_input = [host for host in layers if host.endswith(tuple(said))]
        else:
            raise ConfigError(f"{config.file}: feedforward_modules={said!r}; expected names.")
        rest = [host for host in layers if host not in on_input]
        tensors = {f"{host}.ia3.scale": p["ia3_l"].reshape(-1) for host, p in layers.items()}
        return {"on_input": patterns(on_input, rest)}, tensors
