"""LowRankAdapter: an adapter with factorised weights.

A baseline of Mahabadi et al. 2021, "Compacter" (https://arxiv.org/abs/2106.04647).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.activations import activation
from opendelta.delta_models.bottleneck import BottleneckModel, bottleneck_width
from opendelta.delta_models.initialisation import initialise
from opendelta.exceptions import ConfigError


class LowRankLinear(nn.Module):
    """``x @ (W_left @ W_right) + b`` for x of shape (..., in).

    Parameters: `W_left` (in, rank), `W_right` (rank, out), `b` (out,) starting at 0.
    """

    def __init__(self, in_width: int, out_width: int, rank: int, w_init: str) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"low_rank_rank={rank}; expected 1 or more.")
        self.W_left = nn.Parameter(torch.empty(in_width, rank))
        self.W_right = nn.Parameter(torch.empty(rank, out_width))
        self.b = nn.Parameter(torch.zeros(out_width))
        for weight in (self.W_left, self.W_right):
            initialise(weight.data, w_init, 0.01, "low_rank_w_init")

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.flatten(0, -2)  # no -1 for nothing
        y = torch.addmm(self.b, rows @ self.W_left, self.W_right)
        return y.view(*x.shape[:-1], y.shape[-1])


class LowRankAdapter(nn.Module):
    """``x + up(act(down(x)))`` with low-rank linears, for x of shape (..., width)."""

    def __init__(
        self, width: int, reduction_factor: int, non_linearity: str, w_init: str, rank: int
    ) -> None:
        super().__init__()
        inner = bottleneck_width(width, reduction_factor, "LowRankAdapterModel")
        self.activation = activation(non_linearity)
        self.down_sampler = LowRankLinear(width, inner, rank, w_init)
        self.up_sampler = LowRankLinear(inner, width, rank, w_init)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.to(self.down_sampler.b.dtype)
        return hidden + self.up_sampler(self.activation(self.down_sampler(x))).to(hidden.dtype)


class LowRankAdapterConfig(BaseDeltaConfig):
    """Config of `LowRankAdapterModel`; its fields are that constructor's arguments."""


@register("lowrankadapter")
class LowRankAdapterModel(BottleneckModel):
    """Adapters with low-rank weights behind modules: very few parameters.

    Args:
        backbone_model: the model to modify, in place.
        reduction_factor: the bottleneck is ``width // reduction_factor`` wide.
        non_linearity: name of the activation, see `activation`.
        low_rank_w_init: ``"glorot-uniform"``, ``"glorot-normal"`` or ``"normal"``.
        low_rank_rank: rank of each weight.
        modified_modules: see `DeltaBase`, also for the arguments that follow.

    Raises:
        ConfigError: for a factor or rank below 1, or an unknown name.
    """

    delta_type: ClassVar[str] = "low_rank_adapter"
    config_class = LowRankAdapterConfig
    layer_name: ClassVar[str] = "low_rank_adapter"

    def __init__(
        self,
        backbone_model: nn.Module,
        reduction_factor: int = 32,
        non_linearity: str = "gelu_new",
        low_rank_w_init: str = "glorot-uniform",
        low_rank_rank: int = 1,
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
        *,
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        self._construct()

    def new_layer(self, width: int) -> nn.Module:
        return LowRankAdapter(
            width,
            self.reduction_factor,
            self.non_linearity,
            self.low_rank_w_init,
            self.low_rank_rank,
        )
