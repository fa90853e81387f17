"""LoRA: a low-rank term beside a linear map (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.addressing.feed_forward import about_experts
from opendelta.addressing.patterns import as_patterns, matches_any
from opendelta.basemodel import DeltaBase
from opendelta.delta.plan import Plan, reads_without_calling
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.low_rank_add import low_rank_add
from opendelta.exceptions import AddressingError, ConfigError, InsertionError, nearest
from opendelta.ground.containers import Args, Kwargs, first_hidden, map_hidden
from opendelta.ground.names import dotted
from opendelta.ground.widths import read_widths
from opendelta.mechanism.dispatch import AfterDispatcher, onto
from opendelta.mechanism.engines import split_by
from opendelta.mechanism.insertion import Insertion
from opendelta.mechanism.ownership import own_children

if TYPE_CHECKING:
    from opendelta.mechanism.rows import Rows


class LoraLayer(nn.Module):
    """The low-rank term of a linear map.

    Parameters: `lora_A` (r, in) with Kaiming-uniform values, `lora_B` (out, r) with zeros.

    Raises:
        ConfigError: for a rank below 1 or a dropout outside [0, 1).
    """

    def __init__(
        self, in_width: int, out_width: int, r: int, lora_alpha: float, lora_dropout: float
    ) -> None:
        super().__init__()
        if r < 1:
            raise ConfigError(f"lora_r={r}; expected a rank of 1 or more.")
        if not math.isfinite(lora_alpha):
            raise ConfigError(f"lora_alpha={lora_alpha}; expected a finite number.")
        if not 0 <= lora_dropout < 1:
            raise ConfigError(f"lora_dropout={lora_dropout}; expected a share in [0, 1).")
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.lora_dropout = lora_dropout
        self.lora_A = nn.Parameter(torch.empty(r, in_width))
        self.lora_B = nn.Parameter(torch.zeros(out_width, r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise `lora_A`; `lora_B` starts at zero, so that the term does."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """Add the term of `x` (..., in) onto `output` (..., out); returns that shape and dtype."""
        dropout = self.lora_dropout if self.training else 0.0
        return low_rank_add(output, x, self.lora_A, self.lora_B, self.scaling, dropout)

    @staticmethod
    def routed(
        layers: list[LoraLayer],
        rows: Rows,
        host: nn.Module,
        args: Args,
        kwargs: Kwargs,
        output: Any,
    ) -> Any:
        """Add to each row of a batch the term of its delta, all in one product.

        Lower ranks are filled up with zeros, and so are the weights for rows without any term.
        """
        x = first_hidden(args, kwargs)
        rows.repeats(x, host)  # raises where these are not the rows
        r = max(layer.r for layer in layers)
        a = rows.pick([F.pad(layer.lora_A, (0, 0, 0, r - layer.r)) for layer in layers])
        b = rows.pick([F.pad(layer.lora_B * layer.scaling, (0, r - layer.r)) for layer in layers])
        entries = x.reshape(len(rows), -1, x.shape[-1]).to(a.dtype)
        dropouts = [layer.lora_dropout if layer.training else 0.0 for layer in layers]
        if any(dropouts):
            lost = rows.pick([a.new_tensor(dropout) for dropout in dropouts])
            kept = (1 - lost).view(-1, 1, 1)
            entries = entries * torch.bernoulli(kept.expand_as(entries)) / kept
        term = entries @ a.mT @ b.mT
        return map_hidden(output, lambda hidden: hidden + term.to(hidden.dtype).view_as(hidden))

    def update(self, host: Any, dtype: torch.dtype) -> Tensor:
        """What the term adds to the host's weight, in its layout.

        That is ``scaling * B A`` of shape (out, in), transposed for transformers' `Conv1D`.
        """
        product = self.scaling * self.lora_B.to(dtype) @ self.lora_A.to(dtype)
        return product.t() if hasattr(host, "nf") else product

    def example(self) -> Tensor:
        """An input of the host, float32, by which to tell what it computes."""
        width = self.lora_A.shape[1]
        return torch.linspace(-1, 1, 2 * width, device=self.lora_A.device).view(2, width)


class LoraConvLayer(LoraLayer):
    """The low-rank term of a convolution: one of rank r with its kernel, then a pointwise one.

    Parameters: `lora_A` (r, in / groups, *kernel), `lora_B` (out, r, 1, ...).
    """

    routed = None  # type: ignore[assignment]  # each delta on its rows alone

    def __init__(self, host: Any, r: int, lora_alpha: float, lora_dropout: float) -> None:
        super().__init__(host.in_channels, host.out_channels, r, lora_alpha, lora_dropout)
        kernel = host.kernel_size
        self.groups = host.groups
        self.lora_A = nn.Parameter(torch.empty(r, host.in_channels // host.groups, *kernel))
        self.lora_B = nn.Parameter(torch.zeros(host.out_channels, r, *(1 for _ in kernel)))
        self.reset_parameters()
        self.convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
        self.options = {"stride": host.stride, "padding": host.padding, "dilation": host.dilation}
        self.pad_mode = host.padding_mode
        self.pad = tuple(getattr(host, "_reversed_padding_repeated_twice", ()))

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        dropout = self.lora_dropout if self.training else 0.0
        x = F.dropout(x.to(self.lora_A.dtype), dropout)
        options = dict(self.options)
        if self.pad_mode != "zeros":
            x, options["padding"] = F.pad(x, self.pad, mode=self.pad_mode), 0
        # Each group has the same A: r channels of every group's input.
        kernel = self.lora_A.repeat(self.groups, *(1 for _ in self.lora_A.shape[1:]))
        z = self.convolve(x, kernel, groups=self.groups, **options)
        term = self.convolve(z, self.lora_B, groups=self.groups)
        return output + (term * self.scaling).to(output.dtype)

    def update(self, host: Any, dtype: torch.dtype) -> Tensor:
        """The product of the factors as a kernel (out, in / groups, *kernel)."""
        b, a = self.lora_B.to(dtype).flatten(1), self.lora_A.to(dtype).flatten(1)
        return (self.scaling * b @ a).view(host.weight.shape)

    def example(self) -> Tensor:
        kernel = self.lora_A.shape[2:]
        sizes = [2 * d * k for d, k in zip(self.options["dilation"], kernel, strict=True)]
        shape = (1, self.lora_A.shape[1] * self.groups, *sizes)
        device = self.lora_A.device
        return torch.linspace(-1, 1, math.prod(shape), device=device).view(shape)


class LoraEmbeddingLayer(LoraLayer):
    """The low-rank term of an embedding: ``B A[:, ids]``.

    Parameters: `lora_A` (r, vocabulary) from N(0, 1/3), the size that a linear's low-rank
    activation has for inputs of unit variance, and `lora_B` (width, r) with zeros.
    """

    routed = None  # type: ignore[assignment]  # each delta on its rows alone

    def __init__(self, host: Any, r: int, lora_alpha: float, lora_dropout: float) -> None:
        super().__init__(host.num_embeddings, host.embedding_dim, r, lora_alpha, lora_dropout)
        self.padding_idx = host.padding_idx

    def reset_parameters(self) -> None:
        nn.init.normal_(self.lora_A, std=3**-0.5)

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        z = F.embedding(x, self.lora_A.t(), self.padding_idx)
        z = F.dropout(z, self.lora_dropout if self.training else 0.0)
        return output + (F.linear(z, self.lora_B) * self.scaling).to(output.dtype)

    def update(self, host: Any, dtype: torch.dtype) -> Tensor:
        """The product of the factors as a table (vocabulary, width)."""
        return super().update(host, dtype).t()

    def example(self) -> Tensor:
        return torch.arange(min(4, self.lora_A.shape[1]), device=self.lora_A.device)


class LoraConfig(BaseDeltaConfig):
    """Config of `LoraModel`; its fields are that constructor's arguments."""


@register
class LoraModel(DeltaBase):
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

    delta_type: ClassVar[str] = "lora"
    config_class = LoraConfig
    default_modified_modules: ClassVar[list[str]] = ["attn.q", "attn.v"]

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
    ) -> None:
        self._construct()

    def default_targets(self, structure: CommonStructureMap) -> list[list[str]]:
        """The projections of q and v; in a backbone without any, those of the feed-forward."""
        roles = self.default_modified_modules
        if set(roles).isdisjoint(structure.roles()):
            roles = ["ff.w1", "ff.w2"]
        transposed = {
            name for name, m in self.plan.targeting.own if getattr(m, "transposed", False)
        }
        found = [[n for n in structure.addressed(role) if n not in transposed] for role in roles]
        return found

    def plan_targets(self, plan: Plan, patterns: list[str]) -> None:
        super().plan_targets(plan, patterns)
        modified = {i.host_name for i in plan.insertions}
        for argument in ("rank_pattern", "alpha_pattern"):
            for pattern in as_patterns(list(getattr(self, argument) or ()), argument):
                if not any(
                    matches_any(plan.targeting.names_of(name), pattern) for name in modified
                ):
                    raise AddressingError(
                        f"{argument}: {pattern!r} addresses none of the modified modules."
                        + nearest(pattern, modified)
                    )

    def update_module(self, module: nn.Module, key: str) -> None:
        """Put a low-rank term beside the module called `key`, or beside all linears inside it."""
        _, _, target = self.find_module(module, key)
        parts = {key: target}
        if own_children(target) and not hasattr(target, "weight"):
            parts = {
                name: part
                for name, part in self.plan.targeting.named_inside(key)
                if _is_linear(part)
                and name != key
                and not reads_without_calling(self.backbone_model, name)
            }
        if not parts:
            raise InsertionError(
                f"{key!r} ({type(target).__name__}) holds no linear that LoRA could be put on."
                + about_experts(target)
            )
        for name, part in parts.items():
            if not self.plan.on(part) and not self.plan.targeting.is_excluded(name):
                layer = self.new_layer(name, part)
                self.insert_action(part, layer, "lora", AfterDispatcher, onto)

    def new_layer(self, name: str, target: Any) -> LoraLayer:
        """The low-rank term for the module called `name`.

        Raises:
            InsertionError: if that is no linear map.
        """
        r = self._by_pattern(self.rank_pattern, name, self.lora_r)
        alpha = self._by_pattern(self.alpha_pattern, name, self.lora_alpha)
        if split_by(target) is not None:
            from opendelta.delta_models.split_lora import SplitLoraLayer  # needs this module first

            SplitLoraLayer.require_linear(name, target)
            return SplitLoraLayer(
                target.in_features, target.out_features, r, alpha, self.lora_dropout
            )
        if hasattr(target, "num_embeddings") and hasattr(target, "embedding_dim"):
            return LoraEmbeddingLayer(target, r, alpha, self.lora_dropout)
        if hasattr(target, "in_channels") and not getattr(target, "transposed", True):
            return LoraConvLayer(target, r, alpha, self.lora_dropout)
        widths = read_widths(target)
        if widths is None or not _is_linear(target):
            raise InsertionError(
                f"{name!r} is a {type(target).__name__}, which is no linear map: LoRA goes on "
                "linears, convolutions (not transposed ones) and embeddings, or on a module that "
                "holds linears." + about_experts(target)
            )
        return LoraLayer(*widths, r, alpha, self.lora_dropout)

    def folds(self, insertion: Insertion) -> dict[str, Tensor]:
        """The host's weight with the low-rank term in it."""
        layer: Any = insertion.module
        weight: Any = insertion.host.weight
        update = layer.update(insertion.host, weight.dtype).to(weight.device)
        return {"weight": weight + update}

    def combined_config(self, deltas: Sequence[DeltaBase]) -> BaseDeltaConfig:
        """Ranks add up, module by module; with alpha equal to the rank nothing is scaled."""
        ranks: Counter[str] = Counter()
        for delta in deltas:
            for insertion in delta.insertions:
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
            for insertion in delta.insertions:
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

    def export_peft(self, path: str | os.PathLike[str]) -> None:
        """Write this delta as a PEFT adapter: ``PeftModel.from_pretrained(backbone, path)``.

        The folder gets ``adapter_config.json`` and ``adapter_model.safetensors``. They hold what
        `save_finetuned` would save: this delta, and the backbone's parameters that were trained
        with it (whole modules as PEFT's `modules_to_save`).

        Args:
            path: the folder; it is made if it does not exist.

        Raises:
            ConfigError: for a convolution with groups, dilation or padding other than zeros, or
                an embedding with `max_norm`, where PEFT's LoRA computes something else.
            CheckpointError: if `path` is a file.
        """
        from opendelta.delta_models.peft_files import export_peft  # which needs this module first

        export_peft(self, path)

    def _by_pattern(self, table: dict[str, Any] | None, name: str, default: Any) -> Any:
        names = tuple(self.plan.targeting.names_of(name)) if table else ()
        return next((v for p, v in (table or {}).items() if matches_any(names, p)), default)


def _is_linear(module: nn.Module) -> bool:
    """A linear by its attributes: in and out features, or those of transformers' Conv1D."""
    return read_widths(module) is not None and (
        hasattr(module, "in_features") or hasattr(module, "nf")
    )
