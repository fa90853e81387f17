"""What an engine made of a tensor, told by the tensor itself: no engine is imported.

A sharded tensor is a `DTensor` (FSDP2, tensor parallelism), is partitioned by DeepSpeed's ZeRO-3
(it has a ``ds_id``), or is distributed by BMTrain (`opendelta.backends.bmt`). What is said of it
here holds on every rank, and whatever needs other ranks must be called on all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opendelta.backends import bmt
from opendelta.exceptions import CheckpointError
from opendelta.ground.walk import every_module, every_parameter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`: it has placements on a mesh of devices."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_partitioned(tensor: Any) -> bool:
    """Whether a tensor is partitioned by ZeRO-3: empty, but while a module that needs it runs."""
    return hasattr(tensor, "ds_id")


def is_flattened(tensor: Any) -> bool:
    """Whether FSDP1 made one flat tensor of this one and others."""
    return getattr(tensor, "_fsdp_flattened", False)


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is a shard, or is held by what made shards of others."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def in_a_group() -> bool:
    """Whether there is a process group: only its ranks can share a backbone."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameter of a module is a shard."""
    if bmt.has_distributed(module):
        return True
    return in_a_group() and any(map(is_shard, every_parameter(module)))


def class_name(module: nn.Module) -> str:
    """The name of a module's class; FSDP2 and BMTrain put one of their own before it."""
    name = type(module).__name__
    if not name.startswith(("FSDP", "bmtrain.")):
        return name
    bases = (base.__name__ for base in type(module).__bases__)
    return next((n for n in bases if name in (f"FSDP{n}", f"bmtrain.Distributed{n}")), name)


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor that a shard is from."""
    noted = "_original_shape" if bmt.is_distributed(tensor) else "ds_shape"
    shape: torch.Size = getattr(tensor, noted, tensor.shape)
    return shape


def full(tensor: Tensor) -> Tensor:
    """The whole tensor that a shard is from, on every rank; any other tensor itself."""
    if is_dtensor(tensor):
        whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return whole
    if is_partitioned(tensor):
        is_whole = tensor.shape == full_shape(tensor)  # while its module runs, which still needs it
        with gathered(() if is_whole else (tensor,)):
            return tensor.detach().clone()
    if bmt.is_distributed(tensor):
        return bmt.whole(tensor)
    return tensor.detach()


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on all ranks, into one that may be a shard."""
    if is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor  # loaded: there is a DTensor

        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        value = value.to(device=target.device, dtype=target.dtype)
        target.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
    elif is_partitioned(target):
        with gathered([target], modifier_rank=0):
            target.copy_(value)
        if hasattr(target, "_z3_optimizer"):  # whose own copy would overwrite it at the next step
            piece = target.ds_tensor.float()  # type: ignore[attr-defined]
            sys.modules["deepspeed"].utils.safe_set_local_fp32_param(target, piece)
    elif bmt.is_distributed(target):
        bmt.fill(target, value)
    else:
        target.copy_(value)
        if hasattr(target, "_hp_mapping"):  # ZeRO-2's optimizer has a copy of its own, too
            target.set_full_hp_param(value.float())  # type: ignore[attr-defined]


def gathered(tensors: Iterable[Tensor], **options: Any) -> Any:
    """A ``with`` block in which those of `tensors` that ZeRO-3 partitioned are whole."""
    shards = list(filter(is_partitioned, tensors))
    if not shards:
        return nullcontext()
    return sys.modules["deepspeed"].zero.GatheredParameters(shards, **options)


def reshard(backbone: nn.Module) -> None:
    """Let FSDP2 put its shards back where a forward without backward left whole tensors."""
    if not in_a_group():
        return
    for module in every_module(backbone):
        if hasattr(type(module), "set_requires_gradient_sync"):  # an FSDPModule
            module.reshard()  # type: ignore[operator]


# --- all ranks together ---------------------------------------------------------------------------


def groups_of(backbone: nn.Module) -> list[ProcessGroup]:
    """The groups of ranks that hold the shards of a backbone; none where it is not sharded."""
    groups: dict[ProcessGroup, None] = {}
    p: Any
    for p in every_parameter(backbone) if in_a_group() else ():
        if is_dtensor(p):
            groups.update(dict.fromkeys(p.device_mesh.get_all_groups()))
        elif is_partitioned(p):
            groups[p.ds_process_group] = None
    return list(groups)


def _said_by_all(backbone: nn.Module, notes: Iterable[str]) -> list[str]:
    """What the ranks that share a backbone say, each once; nothing is read where none share it."""
    if bmt.has_distributed(backbone):
        return bmt.said_by_all("\n".join(notes))
    groups = groups_of(backbone)
    every = ["\n".join(notes)] if groups else []
    for group in groups:
        heard: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather_object(heard, every, group=group)
        every = sorted({one for some in heard for one in some})
    return every


@contextmanager
def agreeing(backbone: nn.Module, error: type[Exception]) -> Iterator[list[Iterable[str]]]:
    """Let the ranks of a sharded backbone compare notes at the end of a ``with`` block.

    Args:
        backbone: what is sharded; nothing is compared where it is not.
        error: raised on every rank whose block went well, if the notes differ or another
            rank's block raised. Each rank sees its own error.

    Yields:
        A list for (iterables of) lines that must be equal on all ranks.
    """
    notes = list[Iterable[str]]()
    try:
        yield notes
    except Exception as own:
        _said_by_all(backbone, [f"{type(own).__name__}: {own}"])
        raise
    every = _said_by_all(backbone, chain.from_iterable(notes))
    if len(every) > 1:
        shown = "\n".join(f"- {one:.2000}" if one else "- nothing against it" for one in every)
        raise error(f"The ranks that share this backbone must do the same here, but say:\n{shown}")


def is_writer(backbone: nn.Module) -> bool:
    """Whether this rank is the one that writes files: the first of those that share a backbone."""
    if bmt.has_distributed(backbone):
        return bmt.is_first()
    return all(torch.distributed.get_rank(group) == 0 for group in groups_of(backbone))


@contextmanager
def written_once(backbone: nn.Module) -> Iterator[bool]:
    """Within the block one rank writes; after it the file is there on all of them, or all raise.

    Yields:
        Whether this rank writes. On a backbone that is not sharded each rank does: its files are
        whole, and the same on ranks that hold the same.

    Raises:
        CheckpointError: where another rank could not write.
    """
    with agreeing(backbone, CheckpointError):
        yield is_writer(backbone)
