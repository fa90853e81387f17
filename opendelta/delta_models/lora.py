"""LoRA: a low-rank term beside a linear map (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.basemodel import DeltaBase
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.host_kinds import Embedding, HostKind
from opendelta.delta_models.low_rank import LoraLayer, LowRankModel
from opendelta.ground.containers import Args, Kwargs
from opendelta.ground.names import dotted
from opendelta.mechanism.dispatch import ADDITIVE, AfterDispatcher, onto


def onto_rows(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """`onto` an embedding, which may have got rows that the delta knows nothing of."""
    delta.require_fit(host)
    return onto(delta, host, args, kwargs, output)


ADDITIVE.add(onto_rows)


class LoraConfig(BaseDeltaConfig):
    """Config of `LoraModel`; its fields are that constructor's arguments."""


@register
class LoraModel(LowRankModel):
    """Low-rank terms beside linear maps.

    Targets are linears (`nn.Linear`, transformers' `Conv1D`, quantised ones), `nn.Conv1d`,
    `nn.Conv2d`, `nn.Conv3d` and `nn.Embedding`; a module that holds others stands for all linears
    inside it.

    Args:
        backbone_model: the model to modify, in place.
        lora_r: rank.
        lora_alpha: the term is scaled by ``lora_alpha / lora_r``.
        lora_dropout: dropout of the term's input.
        modified_modules: see `DeltaBase`, also for the arguments up to `backend`.
        rank_pattern: pattern -> rank of the modules that it addresses, instead of `lora_r`.
        alpha_pattern: pattern -> alpha of the modules that it addresses.

    Raises:
        InsertionError: if a target is no linear map and holds none.
        ConfigError: for a rank below 1 or a dropout outside [0, 1).
    """

    title: ClassVar[str] = "LoRA"
    delta_type: ClassVar[str] = "lora"
    config_class = LoraConfig

    def __init__(
        self,
        backbone_model: nn.Module,
        lora_r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
        *,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        self._construct()

    def put_on(self, host: nn.Module, name: str, kind: HostKind, *hyper: Any) -> None:
        action = onto_rows if isinstance(kind, Embedding) else onto
        self.insert_action(host, LoraLayer(kind, *hyper), "lora", AfterDispatcher, action)

    def folds(self, insertion: Any) -> dict[str, Tensor]:
        """``W + scaling * B A``, whatever the kind of layer."""
        host = insertion.host
        update = insertion.module.update(host.weight.dtype).to(host.weight.device)
        return {"weight": host.weight + update}

    def combined_config(self, deltas: Sequence[DeltaBase]) -> BaseDeltaConfig:
        """Ranks add up, module by module; with alpha equal to the rank nothing is scaled."""
        ranks: Counter[str] = Counter()
        for delta in deltas:
            for insertion in (i for i in delta.insertions if i.of_method):
                layer: Any = insertion.module
                ranks[insertion.host_name] += layer.r
        usual = max(ranks.values(), key=list(ranks.values()).count)
        patterns = dict(zip(ranks, self.patterns_for(list(ranks)), strict=True))
        unusual = {patterns[name]: rank for name, rank in ranks.items() if rank != usual}
        fields = self.config.to_dict() | {
            "lora_r": usual,
            "lora_alpha": usual,
            "rank_pattern": unusual or None,
            "alpha_pattern": unusual or None,
            "modified_modules": list(patterns.values()),
            "exclude_modules": None,
            "common_structure": False,
        }
        return self.config_class.from_dict(fields)

    def combined_tensors(
        self, deltas: Sequence[DeltaBase], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """Factors beside each other: ``[B1 B2] [A1; A2] = B1 A1 + B2 A2``."""
        factors: dict[str, list[Tensor]] = {}
        for delta, weight in zip(deltas, weights, strict=True):
            for insertion in (i for i in delta.insertions if i.of_method):
                layer: Any = insertion.module
                name = dotted(insertion.host_name, insertion.file_name)
                factors.setdefault(f"{name}.lora_A", []).append(layer.lora_A)
                factors.setdefault(f"{name}.lora_B", []).append(
                    layer.lora_B * (weight * layer.scaling)
                )
        return {
            name: torch.cat([p.to(parts[0].device) for p in parts], int(name.endswith("B")))
            for name, parts in factors.items()
        }
