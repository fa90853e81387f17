"""What a layer's weight is, whatever it is stored as: told by calling the layer.

A quantised weight is codes and scales, a sharded one a piece, an offloaded one nothing. What all of
them have is a forward, so that is asked: ``layer.forward(rows)`` runs no hooks, and for an input of
zeros it returns the bias alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.backends.quantised import compute_dtype, execution_device, is_offloaded
from opendelta.backends.sharding import full, full_shape, is_dtensor, is_shard
from opendelta.exceptions import InsertionError
from opendelta.ground.widths import read_widths

CHUNK = 256  # unit vectors that go through a layer at once


def kernel_shape(host: Any) -> tuple[int, ...]:
    """The shape of one row of a weight in torch's layout: (in,), or (in / groups, *kernel)."""
    if hasattr(host, "kernel_size"):
        return (host.in_channels // host.groups, *host.kernel_size)
    widths = read_widths(host)
    assert widths is not None, f"a {type(host).__name__} says no widths"
    return (widths[0],)


def product(host: nn.Module, kernels: Tensor) -> Tensor:
    """``kernels W^T``: the inner products of `kernels` and the rows of a layer's weight.

    The layer is called past its hooks on inputs that hold the kernels. Those of a convolution
    stand where its window sees nothing else: no padding, and every group sees the same.

    Args:
        host: a linear or a convolution.
        kernels: (n, *`kernel_shape`).

    Returns:
        (n, out), in the dtype that the layer computes in.
    """
    return product_and_bias(host, kernels)[0]


def product_and_bias(host: nn.Module, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """`product`, and what the layer adds to it, (out,): its bias, whatever that is called."""
    rows = _as_input(host, kernels)
    dtype = _computes_in(host) or kernels.dtype
    # Plain blocks: DoRA comes by here in compiled forwards.
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        rows = torch.cat([rows.detach(), torch.zeros_like(rows[:1])]).to(dtype)
        output = host.forward(rows)
    for position in _window(host)[1]:
        output = output.select(2, position)
    return output[:-1] - output[-1:], output[-1]  # zeros give the bias


def dense_weight(host: nn.Module) -> Tensor:
    """The weight of a linear or a convolution as a plain float tensor in torch's layout.

    A plain one is returned itself (transposed for transformers' `Conv1D`), a sharded one whole on
    every rank, which all must ask for; any other is told by calling the layer.

    Returns:
        (out, in), or (out, in / groups, *kernel).
    """
    first, *more = _columns(host)
    return (torch.cat([first, *more], 1) if more else first).unflatten(1, kernel_shape(host))


def row_squares(host: nn.Module) -> Tensor:
    """The squared length of each row of `dense_weight`, which is not made whole for it.

    Returns:
        (out,), in float32 or wider.
    """
    total: Any = 0
    for columns in _columns(host):
        wide = torch.promote_types(columns.dtype, torch.float32)
        total = total + torch.linalg.vector_norm(columns, dim=1, dtype=wide).square()
    squares: Tensor = total
    return squares


def _columns(host: nn.Module) -> Iterator[Tensor]:
    """The weight, (out, in) with all dimensions of a kernel in one, by parts of its columns."""
    weight: Any = getattr(host, "weight", None)  # an attribute: BMTrain's are gathered by that
    sharded, shape = is_shard(weight), kernel_shape(host)
    if sharded and (is_dtensor(weight) or weight.shape != full_shape(weight)):
        weight = full(weight)  # which ZeRO-3 would take away again while the layer runs
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if plain and not is_offloaded(host):
        weight = weight.detach()
        yield (weight.t() if hasattr(host, "nf") else weight).flatten(1)
        return
    if sharded:
        raise InsertionError(
            f"A {type(host).__name__} that is quantised and sharded cannot be asked for its "
            "weight: construct the delta first, then shard the backbone with it."
        )
    device = next((t.device for t in (*host.parameters(), *host.buffers())), None)
    device = execution_device(host) or device
    count = math.prod(shape)
    for start in range(0, count, CHUNK):
        units = torch.zeros(min(CHUNK, count - start), count, device=device)
        units.diagonal(start).fill_(1)
        yield product(host, units.unflatten(1, shape)).t()


def _computes_in(host: nn.Module) -> torch.dtype | None:
    """The dtype in which a layer takes its input: what it says, or that of its first floats."""
    tensors = (*host.parameters(recurse=False), *host.buffers(recurse=False))
    floats = (t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1)
    return compute_dtype(host) or next(floats, None)


def _window(host: Any) -> tuple[list[int], list[int]]:
    """For each dimension of space, where a window begins that sees no padding; of which output."""
    if not hasattr(host, "kernel_size"):
        return [], []
    starts, positions = [], []
    for left, stride in zip(left_padding(host), host.stride, strict=True):
        position = math.ceil(left / stride)
        positions.append(position)
        starts.append(position * stride - left)
    return starts, positions


def left_padding(host: Any) -> list[int]:
    """How much a convolution pads before each dimension of space; it may name it in a word."""
    if host.padding == "valid":
        return [0] * len(host.kernel_size)
    if host.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(host.dilation, host.kernel_size, strict=True)]
    return list(host.padding)


def _as_input(host: Any, kernels: Tensor) -> Tensor:
    """`kernels` as inputs of a layer: rows, or images in which each group sees them."""
    if not hasattr(host, "kernel_size"):
        return kernels
    starts, _ = _window(host)
    sizes, places = [], []
    for start, k, d, left in zip(
        starts, host.kernel_size, host.dilation, left_padding(host), strict=True
    ):
        end = start + d * (k - 1) + 1
        sizes.append(max(end, left + 1))  # reflection takes as much from within
        places.append(slice(start, end, d))
    images = kernels.new_zeros(len(kernels), host.groups, kernels.shape[1], *sizes)
    at: tuple[Any, ...] = (..., *places)
    images[at] = kernels.unsqueeze(1)
    return images.flatten(1, 2)
