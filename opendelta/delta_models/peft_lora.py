"""LoRA and DoRA in PEFT's form, in which ranks and alphas go by patterns of another syntax."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from opendelta.delta_models.host_kinds import Embedding
from opendelta.delta_models.peft_form import Layers, PeftForm, require_alike
from opendelta.exceptions import ConfigError
from opendelta.mechanism.insertion import ModuleInsertion
from opendelta.saving.peft_files import (
    Fields,
    PeftConfig,
    commonest,
    exceptions,
    patterns,
    peft_keys,
)

# What a convolution or embedding must be like for PEFT's LoRA to compute what ours does.
_ALIKE: dict[str, tuple[Any, ...]] = {
    "groups": (1,),
    "dilation": ((1,), (1, 1), (1, 1, 1)),
    "padding_mode": ("zeros",),
    "max_norm": (None,),
}
# Initialisations that leave the backbone's weights alone.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_MAGNITUDE = "lora_magnitude_vector"


class PeftLora(PeftForm):
    """Base of the methods that PEFT keeps under ``peft_type="LORA"``, told apart by `use_dora`."""

    peft_types: ClassVar[tuple[str, ...]] = ("LORA",)
    uses_dora: ClassVar[bool] = False
    peft_key: ClassVar[re.Pattern[str]] = re.compile(
        r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.weight)?"
    )
    peft_fields: ClassVar[Fields] = {
        "lora_alpha": (8, (int, float)),
        "lora_dropout": (0.0, (int, float)),
        "use_rslora": (False, bool),
        "alpha_pattern": ({}, dict),
    }
    peft_immaterial: ClassVar[frozenset[str]] = frozenset(
        "r rank_pattern layers_to_transform layers_pattern bias init_lora_weights eva_config "
        "corda_config lora_ga_config loftq_config runtime_config megatron_core qalora_group_size "
        "ensure_weight_tying".split()
    )

    @classmethod
    def reads_peft(cls, values: dict[str, Any]) -> bool:
        return super().reads_peft(values) and bool(values.get("use_dora")) == cls.uses_dora

    def peft_layers(
        self, layers: Mapping[str, ModuleInsertion], others: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for name, insertion in layers.items():
            host = insertion.host
            layer: Any = insertion.module
            require_alike(name, host, _ALIKE, self.title)
            embeds = isinstance(layer.kind, Embedding)
            form = "lora_embedding_{}" if embeds else "lora_{}.weight"
            tensors[f"{name}.{form.format('A')}"] = layer.lora_A
            tensors[f"{name}.{form.format('B')}"] = layer.lora_B
            if self.uses_dora:  # that of a convolution goes along its channels
                length = layer.magnitude
                shape = (1, -1, *(1,) * (layer.lora_B.dim() - 2)) if layer.lora_B.dim() > 2 else -1
                tensors[f"{name}.{_MAGNITUDE}"] = length.detach().reshape(shape)
            ranks[name] = layer.r
            alphas[name] = _plain(layer.lora_alpha / _embedding_scale(host))
        return tensors, {
            "r": commonest(ranks),
            "rank_pattern": exceptions(ranks, peft_keys),
            "lora_alpha": commonest(alphas),
            "alpha_pattern": exceptions(alphas, peft_keys),
            "lora_dropout": self.lora_dropout,
            "bias": "none",
            "use_rslora": False,
        } | ({"use_dora": True} if self.uses_dora else {})

    @classmethod
    def layers_from_peft(
        cls,
        config: PeftConfig,
        settings: dict[str, Any],
        layers: Layers,
        modules: dict[str, nn.Module],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        start = config.values.get("init_lora_weights")
        if start not in _INITIALISATIONS:
            raise ConfigError(
                f"{config.file}: init_lora_weights={start!r} changes the backbone's weights, so "
                "the adapter does not fit the original backbone. Let PEFT save it as a plain LoRA "
                "(save_pretrained with path_initial_model_for_weight_conversion)."
            )
        for pattern, value in settings["alpha_pattern"].items():
            config.expression("alpha_pattern", pattern)
            if not isinstance(value, (int, float)):
                raise ConfigError(
                    f"{config.file}: alpha_pattern: {pattern!r}: {value!r} is no number."
                )
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for host, parts in layers.items():
            require_alike(host, modules[host], _ALIKE, cls.title)
            ranks[host] = 1
            for key, tensor in parts.items():
                magnitude = key == _MAGNITUDE
                name = "magnitude" if magnitude else f"lora_{key[-1]}"
                place = f"{host}.{cls.delta_type}.{name}"
                tensors[place] = tensor.reshape(-1) if magnitude else tensor
                # Tensors of no dimension or of no rank are refused by their shape.
                if name == "lora_A" and tensor.dim() and tensor.numel():
                    ranks[host] = tensor.shape[0]
        alphas = {host: _alpha(settings, host, r, modules[host]) for host, r in ranks.items()}
        fields = {
            "lora_r": commonest(ranks),
            "lora_alpha": commonest(alphas),
            "lora_dropout": settings["lora_dropout"],
            "rank_pattern": exceptions(ranks, patterns) or None,
            "alpha_pattern": exceptions(alphas, patterns) or None,
        }
        return fields, tensors


def _alpha(settings: dict[str, Any], host: str, rank: int, module: nn.Module) -> float:
    """The alpha with which our ``alpha / rank`` is the factor by which PEFT scales the term."""
    found = (v for k, v in settings["alpha_pattern"].items() if re.match(rf"(.*\.)?({k})$", host))
    alpha: float = next(found, settings["lora_alpha"]) * _embedding_scale(module)
    return alpha * math.sqrt(rank) if settings["use_rslora"] else alpha


def _embedding_scale(host: nn.Module) -> float:
    """By what an embedding multiplies its rows; PEFT multiplies its LoRA by it too, we do not."""
    scale = getattr(host, "embed_scale", None) if isinstance(host, nn.Embedding) else None
    return 1.0 if scale is None else float(scale)


def _plain(value: float) -> float:
    """An integer where it is one: some readers of PEFT's files expect that of an alpha."""
    return int(value) if float(value).is_integer() else value
