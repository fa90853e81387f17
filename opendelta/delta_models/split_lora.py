"""LoRA beside a linear that tensor parallelism splits.

A linear split by columns has a slice of the output features on each rank, one split by rows a slice
of the input features. The factor on that side is split alike and the other one is whole on every
rank, so that ranks exchange no more than the low-rank activation (or, backward, its gradient).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendelta.backends.sharding import is_dtensor
from opendelta.delta_models.lora import LoraLayer
from opendelta.exceptions import InsertionError
from opendelta.mechanism.engines import split_by


class _Shared(torch.autograd.Function):
    """What every rank has whole and uses for its own slice: gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(torch.autograd.Function):
    """The sum over the ranks of what each has computed from its own slice."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, group: Any) -> Tensor:
        z = z.contiguous().clone()
        torch.distributed.all_reduce(z, group=group)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class SplitLoraLayer(LoraLayer):
    """The low-rank term of a split linear; its factors are `DTensor`s, and whole in files.

    Its activations are local tensors, as transformers hands them on: whole, or this rank's slice.
    Dropout draws on each rank's own random state.
    """

    routed = None  # type: ignore[assignment]  # rows with deltas of their own are not split

    @staticmethod
    def require_linear(name: str, host: nn.Module) -> None:
        """Refuse what is split and no linear.

        Raises:
            InsertionError: naming how it is split.
        """
        weight = split_by(host)
        if weight.dim() != 2 or weight.device_mesh.ndim != 1 or not hasattr(host, "in_features"):
            raise InsertionError(
                f"{name!r} ({type(host).__name__}) is split by tensor parallelism (placements "
                f"{tuple(weight.placements)} over {weight.device_mesh.size()} ranks): LoRA follows "
                "the plan on linears over one dimension of a mesh alone. Leave it out with "
                "exclude_modules."
            )

    def split_like(self, host: nn.Module) -> None:
        """Split the factors, which are the same on all ranks, as the host's weight is."""
        from torch.distributed.tensor import Replicate, distribute_tensor  # loaded by the host

        weight: Any = host.weight
        (placement,) = weight.placements
        by_rows = getattr(placement, "dim", 0) % 2 == 1
        a, b = (placement, Replicate()) if by_rows else (Replicate(), placement)
        for name, where in (("lora_A", a), ("lora_B", b)):
            values = getattr(self, name).detach()
            shard = distribute_tensor(values, weight.device_mesh, [where], src_data_rank=None)
            setattr(self, name, nn.Parameter(shard))

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """Add the term of `x` onto `output`, each of them whole or this rank's slice."""
        a: Any = self.lora_A
        b: Any = self.lora_B
        group = a.device_mesh.get_group()
        x = F.dropout(x.to(a.dtype), self.lora_dropout if self.training else 0.0)
        if is_dtensor(x):  # PyTorch's own plans, whose algebra moves what has to be moved
            return output + (F.linear(F.linear(x, a), b) * self.scaling).to(output.dtype)
        if x.shape[-1] == a.shape[1]:
            z = F.linear(x, a.full_tensor())
        else:
            z = _Summed.apply(F.linear(x, a.to_local()), group)
        if output.shape[-1] == b.shape[0]:
            term = F.linear(z, b.full_tensor())
        else:
            term = F.linear(_Shared.apply(z, group), b.to_local())
        return output + (term * self.scaling).to(output.dtype)
