"""Methods as users write them, outside of the library: each asks something of the contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import opendelta
from opendelta import BaseDeltaConfig, DeltaBase

Patterns = list[str] | None


# --- a scale on the last real token of each text --------------------------------------------------


class LastTokenLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, hidden: Tensor) -> Tensor:
        mask = opendelta.call_arguments()["attention_mask"]
        every = torch.arange(mask.shape[1])
        last = (mask * (every + 1)).argmax(1, keepdim=True)
        is_last = every[-hidden.shape[1] :] == last  # what is cached is not computed again
        return torch.where(is_last.unsqueeze(-1), hidden * self.factor, hidden)


class LastTokenConfig(BaseDeltaConfig):
    pass


@opendelta.register
class LastTokenModel(DeltaBase):
    delta_type = "test_last_token"
    config_class = LastTokenConfig

    def __init__(self, backbone_model: nn.Module, modified_modules: Patterns = None) -> None:
        self._construct()

    def update_module(self, module: nn.Module, key: str) -> None:
        target = module.get_submodule(key)
        self.insert_module(target, "after", LastTokenLayer(self.widths(target)[1]), "last")


# --- a fusion of the deltas of a host -------------------------------------------------------------


class FusionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({"scale": torch.tensor(0.75), "lora": torch.tensor(-0.5)})

    def forward(self, hidden: Tensor, others: dict[str, Any]) -> Tensor:
        made = [self.weights[name] * run(hidden) for name, run in others.items()]
        return hidden + sum(made)


class FusionConfig(BaseDeltaConfig):
    pass


@opendelta.register
class FusionModel(DeltaBase):
    delta_type = "test_fusion"
    config_class = FusionConfig

    def __init__(self, backbone_model: nn.Module, modified_modules: Patterns = None) -> None:
        self._construct()

    def update_module(self, module: nn.Module, key: str) -> None:
        self.insert_module(module.get_submodule(key), "fuse", FusionLayer(), "fusion")


# --- AdaLoRA's step and term ----------------------------------------------------------------------


class AdaLayer(nn.Module):
    """``B (e * (A x))``."""

    def __init__(self, width_in: int, width_out: int, r: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(r, width_in) / width_in)
        self.e = nn.Parameter(torch.zeros(r))
        self.B = nn.Parameter(torch.randn(width_out, r) / width_out)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.A.T * self.e) @ self.B.T

    def keep(self, kept: Tensor) -> None:
        self.A, self.e = nn.Parameter(self.A[kept]), nn.Parameter(self.e[kept])
        self.B = nn.Parameter(self.B[:, kept])


class AdaConfig(BaseDeltaConfig):
    pass


@opendelta.register
class AdaModel(DeltaBase):
    delta_type = "test_ada"
    config_class = AdaConfig

    def __init__(
        self,
        backbone_model: nn.Module,
        r: int = 4,
        budget: int = 2,
        prunes_at: int = 3,
        modified_modules: Patterns = None,
        ranks: dict[str, int] | None = None,
    ) -> None:
        self._construct()

    def update_module(self, module: nn.Module, key: str) -> None:
        target = module.get_submodule(key)
        layer = AdaLayer(*self.widths(target), (self.ranks or {}).get(key, self.r))
        self.insert_module(target, "parallel", layer, "ada")

    @torch.no_grad()
    def on_step(self, step: int) -> None:
        if step != self.prunes_at:
            return
        layers = {i.host_name: i.module for i in self.insertions}
        importance = torch.cat([(p.e * p.e.grad).abs() for p in layers.values()])
        least = importance.sort(descending=True).values[self.budget - 1]
        for layer in layers.values():
            layer.keep((layer.e * layer.e.grad).abs() >= least)
        self.become(ranks={name: len(layer.e) for name, layer in layers.items()})

    def loss_term(self) -> Tensor:
        squares = [p.T @ p - torch.eye(p.shape[1]) for i in self.insertions for p in [i.module.A.T]]
        return 0.1 * torch.stack([square.square().sum() for square in squares]).sum()


# --- another parameter in the place of the host's -------------------------------------------------


class OtherParameterConfig(BaseDeltaConfig):
    pass


@opendelta.register
class OtherParameterModel(DeltaBase):
    delta_type = "test_other_parameter"
    config_class = OtherParameterConfig

    def __init__(
        self,
        backbone_model: nn.Module,
        which: str = "weight",
        scaled_by: float = 2.0,
        rows_more: int = 0,
        learns: bool = True,
        is_saved: bool = True,
        modified_modules: Patterns = None,
    ) -> None:
        self._construct()

    def update_module(self, module: nn.Module, key: str) -> None:
        target = module.get_submodule(key)
        own = target._parameters.get(self.which)
        value = None if own is None else self.scaled_by * own.detach()
        if self.rows_more:
            value = torch.zeros(len(own) + self.rows_more, *own.shape[1:])
        self.insert_parameter(target, self.which, value, self.learns, self.is_saved)

    def folds(self, insertion: Any) -> dict[str, Tensor]:
        return {self.which: insertion.content.detach()}


# --- scales and shifts, folded in the way that is asked for ---------------------------------------


class AffineLayer(nn.Module):
    def __init__(self, width: int, dims_after: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.dims_after = dims_after

    def along(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * self.dims_after)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.along(self.factor) + self.along(self.shift)


class AffineConfig(BaseDeltaConfig):
    pass


@opendelta.register
class AffineModel(DeltaBase):
    """``hidden * factor + shift`` behind linears, Conv1D and convolutions."""

    delta_type = "test_affine"
    config_class = AffineConfig

    def __init__(
        self,
        backbone_model: nn.Module,
        fold: str = "right",
        modified_modules: Patterns = None,
    ) -> None:
        self._construct()

    def update_module(self, module: nn.Module, key: str) -> None:
        target = module.get_submodule(key)
        width, dims = self.widths(target)[1], len(getattr(target, "kernel_size", ()))
        self.insert_module(target, "after", AffineLayer(width, dims), "affine")

    def folds(self, insertion: Any) -> dict[str, Tensor]:
        host, layer = insertion.host, insertion.module
        factor, shift = layer.factor.detach().to(host.weight), layer.shift.detach().to(host.weight)
        by_rows = not hasattr(host, "nf")  # transformers' Conv1D has its outputs in columns
        shape = (-1, *[1] * (host.weight.dim() - 1)) if by_rows else (1, -1)
        weight = host.weight.detach() * factor.view(shape)
        if self.fold == "another name":
            return {"wieght": weight}
        if self.fold == "another shape":
            return {"weight": weight.flatten()}
        if self.fold == "without the bias":  # right only where there is none
            return {"weight": weight}
        return {"weight": weight, "bias": host.bias.detach() * factor + shift}


# --- in the style of 1.0 --------------------------------------------------------------------------


class OldFoldConfig(BaseDeltaConfig):
    pass


@opendelta.register
class OldFoldModel(DeltaBase):
    """``W x + s * (1 1^T) x``, by `merges_into` and `merged`."""

    delta_type = "test_old_fold"
    config_class = OldFoldConfig
    merges_into = "weight"

    def __init__(
        self, backbone_model: nn.Module, start: float = 0.5, modified_modules: Patterns = None
    ):
        self._construct(locals())

    def update_module(self, module: nn.Module, key: str) -> None:
        self.insert_module(module.get_submodule(key), "parallel", SumLayer(self.start), "sums")

    def merged(self, insertion: Any, weight: Tensor) -> Tensor:
        return weight + insertion.module.strength.detach().to(weight)


class SumLayer(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(float(start)))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) * self.strength
