"""Compacter: an adapter whose weights are sums of Kronecker products.

Mahabadi et al. 2021 (https://arxiv.org/abs/2106.04647), on parameterised hypercomplex
multiplication (PHM), Zhang et al. 2021 (https://arxiv.org/abs/2102.08597).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opendelta.delta.plan import Plan
from opendelta.delta.registry import register
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.activations import activation
from opendelta.delta_models.bottleneck import BottleneckModel, bottleneck_width
from opendelta.delta_models.initialisation import initialise
from opendelta.exceptions import ConfigError

_RULE_STD = 0.01


class PHMLinear(nn.Module):
    """``x @ H + b`` with ``H = sum_i kron(rule_i, W_i)``, for x of shape (..., in).

    Parameters, with n the division: `phm_rule` (n, n, n), or its factors `phm_rule_left`
    (n, n, 1) and `phm_rule_right` (n, 1, n); `W` (n, in/n, out/n), or its factors `W_left`
    (n, in/n, rank) and `W_right` (n, rank, out/n); `b` (out,) starting at 0.

    Args:
        in_width, out_width: multiples of `division`.
        shared: parameters of another layer to use instead of new ones, by name.
        options: the hyper-parameters of `CompacterModel`.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        use_bias: bool,
        shared: dict[str, nn.Parameter],
        options: CompacterModel,
    ) -> None:
        super().__init__()
        n, rank = options.hypercomplex_division, options.phm_rank
        self.b: nn.Parameter | None
        self.by_steps = bool(options.kronecker_prod)
        rule = {"phm_rule": (n, n, n)}
        if options.factorized_phm_rule:
            rule = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        weight = {"W": (n, in_width // n, out_width // n)}
        if options.factorized_phm:
            weight = {"W_left": (n, in_width // n, rank), "W_right": (n, rank, out_width // n)}
        for name, shape in {**rule, **weight}.items():
            p = shared.get(name)
            if p is None:
                p = nn.Parameter(torch.empty(shape))
                if name in rule:
                    _initialise_rule(p.data, options.phm_c_init)
                    p.requires_grad_(options.learn_phm)
                else:
                    how = options.hypercomplex_nonlinearity
                    std = options.phm_init_range
                    initialise(p.data, how, std, "hypercomplex_nonlinearity")
            self.register_parameter(name, p)
        self.register_parameter("b", nn.Parameter(torch.zeros(out_width)) if use_bias else None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self._product("W").dtype

    def _product(self, name: str) -> Tensor:
        # By attribute: on a replica of DataParallel the parameters are plain attributes.
        whole: Tensor | None = getattr(self, name, None)
        if whole is not None:
            return whole
        left: Tensor = getattr(self, f"{name}_left")
        right: Tensor = getattr(self, f"{name}_right")
        return left @ right

    def forward(self, x: Tensor) -> Tensor:
        rule, weight = self._product("phm_rule"), self._product("W")
        if self.by_steps:  # never builds H: first by W, then by the rule
            n = rule.shape[0]
            parts = x.unflatten(-1, (n, -1))
            y = torch.einsum("...ai,kip,kac->...cp", parts, weight, rule).flatten(-2)
        else:
            n, rows, columns = rule.shape[0], weight.shape[1], weight.shape[2]
            h = torch.einsum("kac,kip->aicp", rule, weight).reshape(n * rows, n * columns)
            y = x @ h
        return y if self.b is None else y + self.b


def _initialise_rule(rule: Tensor, how: str) -> None:
    if how == "normal":
        nn.init.normal_(rule, std=_RULE_STD)
    elif how == "uniform":
        nn.init.uniform_(rule, -_RULE_STD, _RULE_STD)
    else:
        raise ConfigError(f"phm_c_init={how!r}: expected 'normal' or 'uniform'.")


class CompacterLayer(nn.Module):
    """``x + up(act(down(x)))`` with PHM linears, for x of shape (..., width)."""

    def __init__(self, down: PHMLinear, up: PHMLinear, non_linearity: str) -> None:
        super().__init__()
        self.activation = activation(non_linearity)
        self.down_sampler = down
        self.up_sampler = up

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.to(self.down_sampler.dtype)
        return hidden + self.up_sampler(self.activation(self.down_sampler(x))).to(hidden.dtype)


class CompacterConfig(BaseDeltaConfig):
    """Config of `CompacterModel`; its fields are that constructor's arguments."""


@register
class CompacterModel(BottleneckModel):
    """Compacters behind modules.

    Args:
        backbone_model: the model to modify, in place.
        modified_modules: see `DeltaBase`, also for the arguments up to `backend`.
        reduction_factor: the bottleneck is ``width // reduction_factor`` wide.
        non_linearity: name of the activation, see `activation`.
        phm_c_init: how the PHM rule starts, ``"normal"`` or ``"uniform"``.
        hypercomplex_division: n, the number of parts of each dimension.
        learn_phm: whether the PHM rule trains.
        hypercomplex_nonlinearity: how W starts: ``"glorot-uniform"``, ``"glorot-normal"`` or
            ``"normal"`` (with `phm_init_range` as its standard deviation).
        shared_phm_rule: one PHM rule for all layers.
        factorized_phm: W as a product of rank `phm_rank`.
        shared_W_phm: one W for all layers of the same widths.
        factorized_phm_rule: the PHM rule as a product of rank 1.
        phm_rank: rank of W's factors.
        phm_init_range: see `hypercomplex_nonlinearity`.
        kronecker_prod: multiply by the two factors in turn instead of building the weight.
        use_bias_up_sampler, use_bias_down_sampler: biases of the projections.

    Raises:
        ConfigError: if a width is no multiple of `hypercomplex_division`, or for a bad value.
    """

    delta_type: ClassVar[str] = "compacter"
    config_class = CompacterConfig
    layer_name: ClassVar[str] = "compactor"  # as in the files of 0.3.2

    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
        reduction_factor: int = 16,
        non_linearity: str = "gelu_new",
        phm_c_init: str = "normal",
        hypercomplex_division: int = 4,
        learn_phm: bool = True,
        hypercomplex_nonlinearity: str = "glorot-uniform",
        shared_phm_rule: bool = False,
        factorized_phm: bool = True,
        shared_W_phm: bool = False,
        factorized_phm_rule: bool = False,
        phm_rank: int = 1,
        phm_init_range: float = 0.0001,
        kronecker_prod: bool | None = None,
        use_bias_up_sampler: bool = True,
        use_bias_down_sampler: bool = True,
        *,
        own_modules: list[str] | dict[str, nn.Module] | None = None,
    ) -> None:
        self._construct()

    def plan_targets(self, plan: Plan, patterns: list[str]) -> None:
        if self.hypercomplex_division < 1 or self.phm_rank < 1:
            raise ConfigError("hypercomplex_division and phm_rank must be 1 or more.")
        if self.phm_init_range < 0:
            raise ConfigError(f"phm_init_range={self.phm_init_range}; expected 0 or more.")
        self._shared: dict[Any, dict[str, nn.Parameter]] = {}
        super().plan_targets(plan, patterns)

    def new_layer(self, width: int) -> nn.Module:
        n = self.hypercomplex_division
        inner = bottleneck_width(width, self.reduction_factor, "CompacterModel")
        inner = max(n, inner)
        for what, size in (("width of the module", width), ("bottleneck", inner)):
            if size % n:
                raise ConfigError(
                    f"The {what} is {size}, which hypercomplex_division={n} does not divide. "
                    f"Choose another division, or reduction_factor (now {self.reduction_factor}; "
                    "the bottleneck is the module's width divided by it)."
                )
        down = self._new_linear(width, inner, self.use_bias_down_sampler)
        up = self._new_linear(inner, width, self.use_bias_up_sampler)
        return CompacterLayer(down, up, self.non_linearity)

    def _new_linear(self, in_width: int, out_width: int, use_bias: bool) -> PHMLinear:
        known = self._shared
        shared: dict[str, nn.Parameter] = {}
        widths = (in_width, out_width)
        if self.shared_phm_rule:
            shared |= known.get("rule", {})
        if self.shared_W_phm:
            shared |= known.get(widths, {})
        linear = PHMLinear(in_width, out_width, use_bias, shared, self)
        named = dict(linear.named_parameters())
        known.setdefault("rule", {k: p for k, p in named.items() if k.startswith("phm")})
        known.setdefault(widths, {k: p for k, p in named.items() if k.startswith("W")})
        return linear
