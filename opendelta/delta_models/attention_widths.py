"""How wide the keys and values of attention modules are: seen in one forward of a pseudo input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.delta.pseudo_input import run_pseudo_input
from opendelta.delta_models.lookup_attention import LookupAttention, watch_attention_lookup
from opendelta.delta_models.prefixed_call import begin, end
from opendelta.ground.containers import Args


class _WidthRecorder(LookupAttention):
    """Stands in for a prefix to see the widths of keys and values."""

    def __init__(self, host: nn.Module, name: str, widths: dict[str, tuple[int, int]]) -> None:
        super().__init__(host, torch.empty(0), torch.empty(0))
        self.name, self.widths = name, widths

    def attend(
        self,
        implementation: str,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.widths[self.name] = key.shape[1] * key.shape[3], value.shape[1] * value.shape[3]
        return function(module, query, key, value, *args, **kwargs)


def measured_widths(backbone: nn.Module, hosts: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Widths of keys and values, all heads together, of those `hosts` that look attention up."""
    watch_attention_lookup()
    widths: dict[str, tuple[int, int]] = {}
    handles: list[RemovableHandle] = []

    def recording(name: str) -> Callable[..., None]:
        return lambda host, args: begin(_WidthRecorder(host, name, widths))

    def recorded(host: nn.Module, args: Args, output: Any) -> None:
        end(host)

    for name, host in hosts.items():
        handles.append(host.register_forward_pre_hook(recording(name)))
        handles.append(host.register_forward_hook(recorded, always_call=True))
    try:
        run_pseudo_input(backbone, hosts)
    finally:
        for handle in handles:
            handle.remove()
    return widths
