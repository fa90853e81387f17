"""BitFit: training biases only (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from opendelta.addressing.feed_forward import about_experts
from opendelta.auto_delta import register
from opendelta.backbone_state import BackboneState
from opendelta.basemodel import DeltaBase
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import InsertionError
from opendelta.insertion import ParameterInsertion, ParameterSlot, place_of
from opendelta.ownership import inserted_names, own_modules
from opendelta.sizes import read_widths


class BitFitConfig(BaseDeltaConfig):
    """Config of `BitFitModel`; its fields are that constructor's arguments."""


@register
class BitFitModel(DeltaBase):
    """Trains the biases of modules, and adds one where there is none.

    All modules inside an addressed module take part. The delta's biases are copies that take the
    place of the backbone's own while the delta is attached; added ones start at zero, so that
    the output is the same at first. Keys stay ``<module>.bias``.

    Args:
        backbone_model: the model to modify, in place.
        modified_modules: see `DeltaBase`, also for the arguments that follow.

    Raises:
        InsertionError: if nothing inside an addressed module can have a bias.
    """

    delta_type: ClassVar[str] = "bitfit"
    config_class = BitFitConfig
    default_modified_modules: ClassVar[list[str]] = ["attn", "ff", "layer_norm", "lm_head.proj"]

    _places: dict[int, list[tuple[str, nn.Module]]] | None = None

    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: list[str] | tuple[str, ...] | str | None = None,
        exclude_modules: list[str] | tuple[str, ...] | str | None = None,
        unfrozen_modules: list[str] | tuple[str, ...] | str | None = None,
        common_structure: bool | None = None,
        interactive_modify: bool | int | None = False,
        backend: str | None = "hf",
    ) -> None:
        self._construct(locals())

    def plan(self, backbone: nn.Module, patterns: list[str]) -> None:
        self._places = self._bias_places()
        super().plan(backbone, patterns)
        self._places = None

    def _bias_places(self) -> dict[int, list[tuple[str, nn.Module]]]:
        """The modules that hold each bias, several if it is tied."""
        places: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in own_modules(self.backbone_model):
            bias = module._parameters.get("bias")
            if bias is not None:
                places.setdefault(id(bias), []).append((name, module))
        return places

    def update_module(self, module: nn.Module, key: str) -> None:
        """Train the biases of the module called `key` and of all inside it."""
        parts = list(self.named_inside(key))
        for name, part in parts:
            if not self.is_excluded(name):
                self.add_bias_to_modules_have_bias_or_known_type(part, name)
        if not self.uses_defaults and not any(self._takes_part(part) for _, part in parts):
            target = module.get_submodule(key)
            raise InsertionError(
                f"{key!r} ({type(target).__name__}) has no bias and takes none: BitFit trains the "
                "biases of linears, convolutions and norms, and of modules that hold such."
                + about_experts(target)
            )

    def _takes_part(self, module: nn.Module) -> bool:
        has_bias = module._parameters.get("bias") is not None
        return has_bias or self._bias_size(module) is not None

    def add_bias_to_modules_have_bias_or_known_type(
        self, c: nn.Module, name: str | None = None
    ) -> None:
        """Train the bias of a module; add one if it has none and is a linear, convolution or norm.

        Args:
            c: a module of the backbone.
            name: its name, if known.
        """
        name = self.name_of(c) if name is None else name
        if self.parameters_on(c):
            return
        bias = c._parameters.get("bias")
        if bias is not None:
            places = (self._places or self._bias_places())[id(bias)]
            self._train(places, nn.Parameter(bias.detach().clone()), ignored=False)
            return
        size = self._bias_size(c)
        if size is None:
            return
        device, dtype = place_of(c) or (None, None)
        parameter = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        self._train([(name, c)], parameter, ignored="bias" not in c._parameters)

    def _train(
        self, places: list[tuple[str, nn.Module]], parameter: nn.Parameter, ignored: bool
    ) -> None:
        name = places[0][0]
        state = BackboneState.of(self.backbone_model)
        slot = state.slots.get(f"{name}.bias") if state is not None else None
        if slot is None:
            slot = ParameterSlot([module for _, module in places], "bias")
        self._insert(ParameterInsertion(slot, name, parameter, ignored))

    @staticmethod
    def _bias_size(module: nn.Module) -> int | None:
        """Width of the bias that a module without one can be given, or None."""
        own_children = set(module._modules) - set(inserted_names(module))
        if own_children or hasattr(module, "num_embeddings"):
            return None
        widths = read_widths(module)
        if widths is not None:
            return widths[1]
        weight = module._parameters.get("weight")  # a norm that only scales
        return weight.shape[0] if weight is not None and weight.dim() == 1 else None
