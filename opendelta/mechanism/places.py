"""Where a module runs, and what follows it there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from opendelta.backends.quantised import compute_dtype, execution_device
from opendelta.mechanism.ownership import own_modules

Place = tuple[torch.device, torch.dtype | None]


def place_of(module: nn.Module) -> Place | None:
    """Where a host runs: the device of its first tensor, and the dtype that it computes in.

    The dtype is what a quantised layer says, else that of the first floating-point tensor of 16
    bits or more (a quantised weight is stored in another), None if there is no such tensor. The
    device of offloaded tensors is where they are brought to.
    """
    device = None
    for _, part in own_modules(module):
        computes_in = compute_dtype(part)
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is None:
                continue
            if device is None:
                device = (execution_device(part) if tensor.is_meta else None) or tensor.device
            if computes_in is not None:
                return device, computes_in
            if tensor.is_floating_point() and tensor.element_size() > 1:
                return device, tensor.dtype
    return None if device is None else (device, None)


def follow(tensors: Iterable[Tensor], old: Place | None, new: Place | None) -> Place | None:
    """Where tensors that were left at `old` belong now that their host is at `new`.

    Returns:
        The device, and the dtype if they shared the old one; None if nothing changed.
    """
    if old is None or new is None or old == new or new[0].type == "meta":
        return None
    tensors = [*tensors]
    if any(t.is_meta for t in tensors):  # there are no values to bring along
        return None
    shared = all(t.dtype == old[1] for t in tensors if t.is_floating_point())
    return new[0], new[1] if shared else None
