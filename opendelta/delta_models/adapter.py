"""Adapter: a bottleneck behind a module (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.activations import activation
from opendelta.delta_models.bottleneck import BottleneckModel
from opendelta.exceptions import ConfigError


class Bottleneck(nn.Sequential):
    """``up(act(down(x)))`` for x of shape (..., in); weights start at N(0, 0.01), biases at 0."""

    def __init__(self, in_width: int, bottleneck_dim: int, out_width: int, non_linearity: str):
        if bottleneck_dim < 1:
            raise ConfigError(f"bottleneck_dim={bottleneck_dim}; expected 1 or more.")
        super().__init__()
        self.down_proj = nn.Linear(in_width, bottleneck_dim)
        self.non_linear = activation(non_linearity)
        self.up_proj = nn.Linear(bottleneck_dim, out_width)
        for linear in (self.down_proj, self.up_proj):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    @property
    def dtype(self) -> torch.dtype:
        """What it takes: its parameters' dtype, float32 where torch quantised it."""
        weight = self.down_proj.weight
        return weight.dtype if isinstance(weight, Tensor) else torch.float32


class AdapterLayer(nn.Module):
    """``x + up(act(down(x)))`` for x of shape (..., width)."""

    def __init__(self, width: int, bottleneck_dim: int, non_linearity: str) -> None:
        super().__init__()
        self.modulelist = Bottleneck(width, bottleneck_dim, width, non_linearity)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.modulelist(hidden.to(self.modulelist.dtype)).to(hidden.dtype)


class AdapterConfig(BaseDeltaConfig):
    """Config of `AdapterModel`; its fields are that constructor's arguments."""


@register
class AdapterModel(BottleneckModel):
    """Adapters behind modules.

    Args:
        backbone_model: the model to modify, in place.
        bottleneck_dim: width of the bottleneck.
        non_linearity: name of the activation, see `activation`.
        modified_modules: see `DeltaBase`, also for the arguments that follow.

    Raises:
        ConfigError: for a `bottleneck_dim` below 1 or an unknown activation.
    """

    delta_type: ClassVar[str] = "adapter"
    config_class = AdapterConfig
    layer_name: ClassVar[str] = "adapter"

    def __init__(
        self,
        backbone_model: nn.Module,
        bottleneck_dim: int = 24,
        non_linearity: str = "gelu_new",
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
        return AdapterLayer(width, self.bottleneck_dim, self.non_linearity)
