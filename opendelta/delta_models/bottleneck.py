"""What the bottleneck methods share: where they sit, and `output + layer(output)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.basemodel import DeltaBase
from opendelta.exceptions import ConfigError
from opendelta.ground.containers import Args, Kwargs, map_hidden
from opendelta.mechanism.dispatch import AfterDispatcher, after


def after_channels(delta: Any, host: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """`after` for a convolution, whose features are dimension 1."""
    return map_hidden(output, lambda hidden: delta(hidden.movedim(1, -1)).movedim(-1, 1))


class BottleneckModel(DeltaBase):
    """Base of the methods that pass a module's output through a residual bottleneck.

    The hidden state is the output, the first element of a tuple or list, or the first tensor of
    a ``ModelOutput`` or dict. By default the bottlenecks sit behind the output projection of each
    attention and the last linear of each feed-forward, before the layer norms.

    A subclass defines `layer_name` and `new_layer`.
    """

    default_modified_modules: ClassVar[list[str]] = ["attn", "ff"]
    layer_name: ClassVar[str]

    def new_layer(self, width: int) -> nn.Module:
        """A bottleneck for hidden states of shape (..., width)."""
        raise NotImplementedError

    def default_targets(self, structure: CommonStructureMap) -> list[list[str]]:
        return [structure.outputs(role) for role in self.default_modified_modules]

    def update_module(self, module: nn.Module, key: str) -> None:
        """Put a bottleneck behind the module called `key`."""
        _, _, target = self.find_module(module, key)
        _, width = self.widths(target)
        is_convolution = hasattr(target, "out_channels")
        action: Callable[..., Any] = after_channels if is_convolution else after
        self.insert_action(target, self.new_layer(width), self.layer_name, AfterDispatcher, action)


def bottleneck_width(width: int, reduction_factor: int, owner: str) -> int:
    """``width // reduction_factor``, at least 1.

    Raises:
        ConfigError: if `reduction_factor` is below 1.
    """
    if reduction_factor < 1:
        raise ConfigError(f"{owner}: reduction_factor={reduction_factor}; expected 1 or more.")
    return max(1, width // reduction_factor)
