"""``output + scaling * dropout(x) A^T B^T``: what LoRA computes in every forward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opendelta.ground.seams import is_plainly_differentiated

FEW_ROWS = 32  # up to so many, PyTorch's own nodes take less time than one in Python


def low_rank_add(
    output: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: float
) -> Tensor:
    """Add a low-rank map of `x` onto `output`.

    Args:
        output: (..., out).
        x: (..., in), any float dtype.
        lora_a: (r, in); its dtype, or that of autocast, is the one computed in.
        lora_b: (out, r).
        scaling: factor of the product.
        dropout: share of `x` that is set to zero.

    Returns:
        (..., out), in the dtype of `output`.
    """
    dtype = lora_a.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if not fused_applies(output, x, lora_a):
        source = F.dropout(_as(x, dtype), dropout) if dropout else _as(x, dtype)
        z = F.linear(source, lora_a) * scaling  # here, before a dtype of less range or precision
        return output + _as(F.linear(z, lora_b), output.dtype)
    seed = int(torch.randint(2**62, ()).item()) if dropout else None
    if torch.is_grad_enabled():
        added: Tensor = LowRankAdd.apply(output, x, lora_a, lora_b, scaling, dropout, seed, dtype)
        return added
    return _forward(output, x, lora_a, lora_b, scaling, dropout, seed, dtype)[0]


def fused_applies(output: Tensor, x: Tensor, lora_a: Tensor) -> bool:
    """Whether `LowRankAdd` computes what the plain operations would, and faster.

    Not for tensor subclasses (shards, quantised ones), compilation, and functional or forward-mode
    differentiation, nor for few rows.
    """
    return (
        not torch.compiler.is_compiling()
        and type(output) is Tensor
        and type(x) is Tensor
        and x.numel() > FEW_ROWS * x.shape[-1]
        and output.shape[:-1] == x.shape[:-1]
        and output.device == x.device == lora_a.device
        and is_plainly_differentiated()
        and not torch.jit.is_tracing()
    )


class LowRankAdd(torch.autograd.Function):
    """The fused path of `low_rank_add`: one node of the autograd graph.

    It keeps ``x`` and the low-rank activation for backward and draws the dropout mask again
    there. The small products are computed with the rank as their rows, which is several times
    faster on CPU than the other way round.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout: float,
        seed: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        added, z = _forward(output, x, lora_a, lora_b, scaling, dropout, seed, dtype)
        ctx.save_for_backward(x, z, lora_a, lora_b)
        ctx.scaling, ctx.dropout, ctx.seed, ctx.dtype = scaling, dropout, seed, dtype
        return added

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, z, lora_a, lora_b = ctx.saved_tensors
        _, needs_x, needs_a, needs_b = ctx.needs_input_grad[:4]
        with _without_autocast(x):
            a, b = _as(lora_a, ctx.dtype), _as(lora_b, ctx.dtype)
            dy = _as(grad.reshape(-1, grad.shape[-1]), ctx.dtype)
            rows = _as(x.reshape(-1, x.shape[-1]), ctx.dtype)
            if needs_a or (needs_b and torch.is_grad_enabled()):
                rows = _drop(rows, ctx.dropout, ctx.seed)
            if torch.is_grad_enabled():  # a second derivative is wanted: z depends on its factors
                z = a @ rows.t()
            dz = b.t() @ dy.t()
            if ctx.scaling != 1:
                dz = dz * ctx.scaling
            grad_x = grad_a = grad_b = None
            if needs_x:
                grad_x = _as(_drop(dz.t() @ a, ctx.dropout, ctx.seed), x.dtype).view(x.shape)
            if needs_a:
                grad_a = _as(dz @ rows, lora_a.dtype)
            if needs_b:
                grad_b = _as((z @ dy).t() * ctx.scaling, lora_b.dtype)
        return grad, grad_x, grad_a, grad_b, None, None, None, None


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _forward(
    output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float,
    seed: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The sum, and the low-rank activation of shape (r, rows)."""
    with _without_autocast(x):
        rows = _drop(_as(x.reshape(-1, x.shape[-1]), dtype), dropout, seed)
        z = _as(lora_a, dtype) @ rows.t()
        to = output.reshape(-1, output.shape[-1])
        b = _as(lora_b, dtype).t()
        if to.dtype == z.dtype:
            added = torch.addmm(to, z.t(), b, alpha=scaling)
        else:
            added = to + _as((z.t() * scaling) @ b, to.dtype)
    # No view: what a node of the graph returns as a view must not be changed in place, and some
    # backbones scale their queries so.
    return torch.ops.aten._unsafe_view(added, output.shape), z


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype; where it has that already, ``to`` takes a microsecond to say so."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _drop(rows: Tensor, dropout: float, seed: int | None) -> Tensor:
    """Dropout whose mask follows from `seed`."""
    if not dropout or seed is None:
        return rows
    generator = torch.Generator(rows.device).manual_seed(seed)
    mask = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    mask.bernoulli_(1 - dropout, generator=generator)
    return rows * mask / (1 - dropout)
