"""The registry, the auto classes, and methods of one's own."""

from __future__ import annotations

import pytest
from pieces import linears
from placed import unchanged
from torch import nn

from opendelta import BaseDeltaConfig, DeltaBase

# --- a config of one's own -----------------------------------------------------------------------


class NarrowConfig(BaseDeltaConfig):
    """Written by hand, without the base fields."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = width


class NarrowModel(DeltaBase):
    config_class = NarrowConfig
    delta_type = "narrow"

    def __init__(
        self, backbone_model: nn.Module, width: int = 1, modified_modules: list[str] | None = None
    ) -> None:
        DeltaBase.__init__(self, backbone_model, modified_modules)
        self.width = width
        self.add_all_delta_to_backbone(self.backbone_model, self.modified_modules)

    def update_module(self, module: nn.Module, key: str) -> None:
        _, _, target = self.find_module(module, key)
        self.insert_sequential_module(target, nn.Linear(8, 8), "narrow")


def test_a_config_that_takes_too_little_leaves_the_backbone_alone() -> None:
    """The config is made before anything is put on the backbone."""
    model = linears(1)
    with unchanged(model), pytest.raises(TypeError, match="modified_modules"):
        NarrowModel(model, modified_modules=["0"])
