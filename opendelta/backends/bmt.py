"""BMTrain: parameters that are shared out over the processes (specification 1.9).

A backbone that `bmtrain.BMTrainModelWrapper` wrapped, or ModelCenter built, consists of
*distributed* parameters: each process holds a flat piece of one, and reading it as an attribute of
its module gathers the whole. Those of the layers in a list lie in the storage of a `Block`, which
gathers a layer for the time of its forward. https://github.com/OpenBMB/BMTrain

BMTrain is imported only once a backbone or the user asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from opendelta.exceptions import ConfigError

if TYPE_CHECKING:
    from opendelta.mechanism.insertion import Insertion


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


def distribute(planned: Iterable[Insertion]) -> None:
    """Make distributed what is about to be inserted, parameters that are shared once.

    Each process keeps its piece of its own initial values, so a random one may be put together
    from several processes, whose seeds need not agree.
    """
    import bmtrain

    made: dict[nn.Parameter, nn.Parameter] = {}

    def distributed(p: nn.Parameter) -> nn.Parameter:
        if is_distributed(p):
            return p
        if p not in made:
            made[p] = bmtrain.DistributedParameter(p.detach(), requires_grad=p.requires_grad)
        return made[p]

    insertion: Any
    for insertion in planned:
        if hasattr(insertion, "parameter"):
            insertion.parameter = distributed(insertion.parameter)
        elif hasattr(insertion, "module"):
            for part in insertion.module.modules():
                for name, p in part._parameters.items():
                    part._parameters[name] = None if p is None else distributed(p)
            bmtrain.BMTrainModelWrapper(insertion.module)  # whose modules gather them


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
