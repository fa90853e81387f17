"""BMTrain: parameters that are shared out over the processes (specification 1.9).

A backbone that `bmtrain.BMTrainModelWrapper` wrapped, or ModelCenter built, consists of
*distributed* parameters: each process holds a flat piece of one, and reading it as an attribute of
its module gathers the whole. Those of the layers in a list lie in the storage of a `Block`, which
gathers a layer for the time of its forward. https://github.com/OpenBMB/BMTrain

BMTrain is imported only once a backbone or the user asks for it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from opendelta.exceptions import ConfigError


def require_bmtrain() -> None:
    """Refuse ``backend="bmt"`` where BMTrain cannot work.

    Raises:
        ConfigError: if it is not installed, or not initialised.
    """
    try:
        import bmtrain
    except ImportError as error:
        raise ConfigError(
            f"backend='bmt' needs BMTrain, which cannot be imported ({error}): "
            "`pip install bmtrain`. Any other torch module is served by backend='hf'."
        ) from error
    if not bmtrain.init.is_initialized():
        raise ConfigError(
            "backend='bmt': BMTrain is not initialised. Call bmtrain.init_distributed() first, in "
            "a script that torchrun starts, then build or wrap the backbone, then put deltas on it."
        )


def is_distributed(p: Tensor | None) -> bool:
    """Whether `p` is one of BMTrain's distributed parameters."""
    engine = sys.modules.get("bmtrain")
    return engine is not None and isinstance(p, engine.DistributedParameter)


def has_distributed(module: nn.Module) -> bool:
    """Whether any parameter of `module` is distributed."""
    return "bmtrain" in sys.modules and any(map(is_distributed, module.parameters()))


def distributed(p: nn.Parameter, made: dict[nn.Parameter, nn.Parameter]) -> nn.Parameter:
    """A parameter as a distributed one; `made` holds those that there are already."""
    if is_distributed(p):
        return p
    if p not in made:
        import bmtrain

        made[p] = bmtrain.DistributedParameter(p.detach(), requires_grad=p.requires_grad)
    return made[p]


def distribute(module: nn.Module, made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Make the parameters of a module distributed, see `distributed`; its modules gather them."""
    import bmtrain

    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = None if p is None else distributed(p, made)
    bmtrain.BMTrainModelWrapper(module)


def whole(p: Any) -> Tensor:
    """The values of a distributed parameter, put together: all processes must ask for them."""
    from bmtrain.distributed import all_reduce

    flat = p.new_zeros(p._original_shape.numel())
    flat[p._start_partition : p._end_partition] = p.detach().reshape(-1)
    values: Tensor = all_reduce(flat, "sum", p._zero_comm)
    return values.view(p._original_shape)


def fill(p: Any, values: Tensor) -> None:
    """Copy `values`, those of the whole parameter, into a distributed parameter."""
    p.data.view(-1).copy_(values.reshape(-1)[p._start_partition : p._end_partition])


def said_by_all(said: str) -> list[str]:
    """What each process says, each text once: BMTrain has no process group of torch's."""
    from bmtrain.global_var import config
    from bmtrain.store import broadcast_object

    world = range(config["world_size"])
    return sorted({broadcast_object(said, config["comm"], rank) for rank in world})


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    import bmtrain

    return bool(bmtrain.rank() == 0)
