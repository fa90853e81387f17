"""A delta and the engine that its backbone is on already: shard it the same way, or say what to do.

Put on before the engine wraps the backbone, a delta is like any other part of it and none of this
applies. Put on afterwards, its parameters would be unknown to the engine, and silently differ
between the ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from opendelta.backends import bmt
from opendelta.backends.sharding import (
    groups_of,
    in_a_group,
    is_dtensor,
    is_flattened,
)
from opendelta.exceptions import DeltaWarning, InsertionError, warn
from opendelta.ground.seams import active_ddp
from opendelta.ground.walk import every_module, every_parameter
from opendelta.mechanism.insertion import Insertion

_ORDER = (
    "Construct (or attach) the delta first, then let the engine wrap the backbone with the delta "
    "on it."
)


def require_open(backbone: nn.Module) -> None:
    """Refuse a backbone whose engine takes no more parameters.

    Raises:
        InsertionError: for the wrapper of DDP or DeepSpeed itself, for a backbone under ZeRO-3
            whose engine was initialised, and for one that FSDP1 flattened.
    """
    if hasattr(backbone, "require_backward_grad_sync") or hasattr(backbone, "allreduce_gradients"):
        raise InsertionError(
            f"The backbone is wrapped by {type(backbone).__name__} already, which would never "
            f"average the gradients of a delta that comes later. {_ORDER}"
        )
    for module in every_module(backbone):
        _require_whole(module)
        if "ds_inflight_param_registry" in module.__dict__:
            raise InsertionError(
                "DeepSpeed's ZeRO-3 was initialised on this backbone already, and its optimizer "
                f"takes no more parameters. {_ORDER}"
            )


def require_whole(backbone: nn.Module) -> None:
    """Refuse a backbone whose modules no longer have parameters of their own.

    Raises:
        InsertionError: if FSDP1 flattened it.
    """
    for module in every_module(backbone):
        _require_whole(module)


def _require_whole(module: nn.Module) -> None:
    if any(map(is_flattened, module._parameters.values())):
        raise InsertionError(
            "FSDP1 (FullyShardedDataParallel) made flat parameters of this backbone, in which no "
            "module has its own any more: a delta can be neither put on, saved nor loaded. Use "
            "FSDP2 (torch.distributed.fsdp.fully_shard), before or after the delta."
        )


def require_reduced(backbone: nn.Module, parameters: Iterable[nn.Parameter]) -> bool:
    """Refuse deltas that DDP does not know, during a forward of its.

    Returns:
        Whether that is settled; it is not where processes there are may yet run it under DDP.

    Raises:
        InsertionError: if DDP runs now and was made before one of `parameters`.
    """
    ddp = active_ddp()
    if ddp is None:
        return not in_a_group()
    known = {id(p) for p in ddp._module_parameters}
    if any(p.requires_grad and id(p) not in known for p in parameters):
        raise InsertionError(
            f"A delta was put on {type(backbone).__name__} after DistributedDataParallel wrapped "
            f"it, so that its gradients are not averaged and the ranks would drift apart. {_ORDER}"
        )
    return True


def split_by(host: nn.Module) -> Any:
    """A parameter of `host` that is on the mesh of tensor parallelism, None if there is none."""
    if _by_fsdp2(host):
        return None
    return next(filter(is_dtensor, every_parameter(host)), None)


def _by_fsdp2(host: nn.Module) -> bool:
    """Whether FSDP2 manages a module, which it marks for torch.compile."""
    return bool(host.__dict__.get("_is_fsdp_managed_module", False))


def join_engine(
    backbone: nn.Module, insertions: Sequence[Insertion], backend: str | None = None
) -> None:
    """Make what is about to act on a backbone part of the engine that the backbone is on.

    Called on every rank, before it acts; the values of the first rank become those of all. What was
    there when the engine came is left alone.

    Args:
        backbone: the model.
        insertions: what is to act.
        backend: ``"bmt"`` to have it distributed by BMTrain in any case.

    Raises:
        InsertionError: if the engine, or the method, cannot do that.

    Warns:
        DeltaWarning: if the backbone is, or was, under ZeRO-1 or ZeRO-2.
    """
    if backend == "bmt" or bmt.has_distributed(backbone):
        distribute(insertions)
    if bmt.has_distributed(backbone):
        return
    new = [i for i in insertions if not i.known_to_engine()] if in_a_group() else []
    if not new:
        return
    require_open(backbone)
    if any(hasattr(p, "_hp_mapping") for p in every_parameter(backbone)):
        warn(
            "DeepSpeed's ZeRO was initialised on this backbone before this delta, which its "
            f"optimizer does not know and will not train. {_ORDER}",
            DeltaWarning,
        )
    groups = groups_of(backbone)
    if groups:
        joining = _joining(new)
        for insertion in new:
            for _, p in insertion.named_parameters():
                for group in groups:
                    torch.distributed.broadcast(p.data, group=group, group_src=0)
        for insertion in joining:
            module: Any = insertion.module
            if split_by(insertion.led_by) is not None:
                module.split_like(insertion.led_by)
            elif _by_fsdp2(insertion.host):
                _fully_shard_like(insertion.host, module, backbone)


def distribute(planned: Iterable[Insertion]) -> None:
    """Make BMTrain's what is about to be inserted, parameters that are shared once.

    Each process keeps its piece of its own initial values, so a random one may be put together
    from several processes, whose seeds need not agree.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for insertion in planned:
        if insertion.module is not None:
            bmt.distribute(insertion.module, made)
        elif isinstance(insertion.content, nn.Parameter):
            insertion.parameter = bmt.distributed(insertion.content, made)  # type: ignore[attr-defined]


def _joining(new: Sequence[Insertion]) -> list[Insertion]:
    """What brings modules, each once, among what is new to an engine.

    Raises:
        InsertionError: if one cannot join it.
    """
    joining: dict[int, Insertion] = {}
    for insertion in new:
        host, module = insertion.host, insertion.module
        if not hasattr(module, "split_like"):
            require_unsplit(insertion.led_by, insertion.place_name)
        if module is not None:
            joining.setdefault(id(module), insertion)
        elif _by_fsdp2(host) and host._parameters.get(insertion.name) is None:
            raise InsertionError(
                f"{insertion.host_name!r} has no {insertion.name} yet, and FSDP2 sharded it "
                f"already: it would not know one that is added. {_ORDER}"
            )
    found = list(joining.values())
    holders = Counter(id(p) for i in found if i.module is not None for p in i.module.parameters())
    if any(count > 1 for count in holders.values()) and any(_by_fsdp2(i.host) for i in found):
        raise InsertionError(
            "The modules of this delta share parameters, which FSDP2 cannot add to a backbone "
            f"that it sharded already. {_ORDER}"
        )
    return found


def require_unsplit(host: nn.Module, host_name: str) -> None:
    """Refuse a host that is split by tensor parallelism.

    Raises:
        InsertionError: naming how it is split.
    """
    weight = split_by(host)
    if weight is not None:
        raise InsertionError(
            f"{host_name!r} is split by tensor parallelism (placements "
            f"{tuple(weight.placements)} over {weight.device_mesh.size()} ranks), which this "
            "delta does not follow there: load the backbone without tp_plan, or use a method that "
            "goes beside split linears (the page Engines has a table)."
        )


def _fully_shard_like(host: nn.Module, delta: nn.Module, backbone: nn.Module) -> None:
    """Shard a delta module on the mesh of FSDP2's unit around its host, under the same policy."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # late: is slow

    units = [m for m in backbone.modules() if hasattr(m, "set_requires_gradient_sync")]
    unit: Any = next(u for u in reversed(units) if any(part is host for part in u.modules()))
    weight: Any
    for weight in filter(is_dtensor, every_parameter(backbone)):
        if not all(placement.is_replicate() for placement in weight.placements[:-1]):
            raise InsertionError(
                f"FSDP2 and tensor parallelism together (placements {tuple(weight.placements)}) "
                f"take no delta afterwards. {_ORDER}"
            )
    weight = next(filter(is_dtensor, every_parameter(unit)))
    mesh = weight.device_mesh
    # Small, and a prefix is used after the module that holds it was called: not resharded between.
    policy = replace(unit._get_fsdp_state()._mp_policy, output_dtype=None)  # it ends in the unit
    fully_shard(delta, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    for name in ("pre_forward", "post_forward"):
        if hasattr(delta, name):
            register_fsdp_forward_method(delta, name)
