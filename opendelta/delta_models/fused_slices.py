"""Which features of a fused projection are queries, keys and values, seen in one forward.

``c_attn``, ``qkv_proj`` and ``query_key_value`` lay them out one after the other, head by head, or
in groups, and no attribute says how. So an input is sent through the backbone, and what attention
is computed of is traced back to the projection by its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opendelta.delta.pseudo_input import hooked, run_pseudo_input
from opendelta.delta_models.lookup_attention import LookupAttention, watch_attention_lookup
from opendelta.delta_models.prefixed_call import begin, end
from opendelta.exceptions import InsertionError
from opendelta.ground.blocks import undone, within
from opendelta.ground.containers import map_hidden

Slices = dict[str, Tensor]  # "q", "k", "v" -> positions among the features


class _Tracer(LookupAttention):
    """Stands in for a prefix to see what transformers' attention lookup is asked for."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host, torch.empty(0), torch.empty(0))
        self.found: dict[str, Slices] = {}
        self.last: tuple[str, Tensor] | None = None  # the projection that ran, and its output

    def hook(self, name: str) -> Callable[..., Any]:
        """A forward hook of the projection called `name`: what follows is traced back to it."""

        def leaf(hidden: Tensor) -> Tensor:
            self.last = name, hidden.detach().requires_grad_()
            torch.set_grad_enabled(True)
            return self.last[1]

        return lambda module, args, output: map_hidden(output, leaf)

    def note(self, *parts: Tensor) -> None:
        """Trace queries, keys and values back to the projection that ran last."""
        if self.last is None:
            return
        (name, output), self.last, slices = self.last, None, Slices()
        for letter, part in zip("qkv", parts, strict=True):
            if part.requires_grad:
                (grad,) = torch.autograd.grad(
                    part, output, torch.rand_like(part) + 0.5, retain_graph=True, allow_unused=True
                )
                reached = torch.zeros_like(output) if grad is None else grad
                slices[letter] = reached.flatten(0, -2).abs().sum(0).nonzero().flatten()
        torch.set_grad_enabled(False)
        every = torch.cat([*slices.values()]).tolist() if slices else []
        if len(slices) == 3 and len(every) == len(set(every)):
            self.found[name] = slices

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
        self.note(query, key, value)
        return function(module, query, key, value, *args, **kwargs)


class _WatchTorch(TorchFunctionMode):
    """Sees torch's own attention, which models call that know no lookup."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention and len(args) >= 3:
            self.tracer.note(*args[:3])
        return function(*args, **(kwargs or {}))


def fused_slices(backbone: nn.Module, projections: Mapping[str, nn.Module]) -> dict[str, Slices]:
    """Where queries, keys and values are among the features of fused projections.

    Args:
        backbone: what they are in. It is run once on a pseudo input and stays as it is.
        projections: linears whose features are all of an attention's queries, keys and values.

    Raises:
        InsertionError: for one whose features were not seen to be that.
    """
    watch_attention_lookup()
    tracer = _Tracer(backbone)
    hooks = {module: tracer.hook(name) for name, module in projections.items()}

    def stop() -> None:
        end(backbone)

    with hooked(hooks), undone(stop):
        begin(tracer)
        with within(_WatchTorch(tracer)):
            run_pseudo_input(backbone, projections)
    for name in projections.keys() - tracer.found.keys():
        raise InsertionError(
            f"{name!r} computes several of an attention's queries, keys and values at once, and it "
            "could not be seen which of its features are which: the attention goes neither "
            "through transformers' lookup nor through torch's function for it. Name the module "
            "itself in modified_modules to have all its features scaled."
        )
    return tracer.found
