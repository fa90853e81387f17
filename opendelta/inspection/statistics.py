"""Counting: what trains, what is frozen, what the deltas add, and what the optimizer holds.

A parameter that is registered under several names (tied embeddings, shared layers, a delta under
two hosts) counts once. A parameter belongs to a delta by where it sits: in a module that a delta
put on the backbone, or in the place where a delta puts a parameter (BitFit's biases, those that it
unfroze as well as those that it added).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from opendelta.backends.bmt import has_distributed
from opendelta.backends.sharding import full_shape
from opendelta.ground.walk import named_tensors, unblocked
from opendelta.mechanism.backbone_state import BackboneState
from opendelta.mechanism.ownership import inserted_names, inserted_parameters
from opendelta.mechanism.state_dict import active_names

logger = logging.getLogger(__name__)

GIB = 1024**3


def numel(p: Tensor) -> int:
    """Values in a parameter: in the whole one where it is sharded, 0 while it has no shape."""
    if is_lazy(p):
        return 0
    return int(getattr(p, "ds_numel", full_shape(p).numel()))  # ZeRO-3 leaves an empty tensor


def count(parameters: Iterable[Tensor]) -> int:
    """Number of values in `parameters`, each parameter once."""
    return sum(numel(p) for p in {id(p): p for p in parameters}.values())


def counts(parameters: Iterable[Tensor]) -> dict[str, Any]:
    """How many values `parameters` hold, and how many and what share of them train."""
    held = list(parameters)
    total, trainable = count(held), count(p for p in held if p.requires_grad)
    return {
        "total_parameters": total,
        "trainable_parameters": trainable,
        "trainable_ratio": ratio(trainable, total),
    }


def delta_parameters(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of the deltas that are attached inside `module`, some of them repeatedly."""
    for inner in map(unblocked, module.modules()):
        deltas = map(inner._modules.get, inserted_names(inner))  # None while it is detached
        parts = map(inner._parameters.get, inserted_parameters(inner))
        yield from (p for delta in deltas if delta is not None for p in delta.parameters())
        yield from (p for p in parts if p is not None)


def num_total_parameters(module: nn.Module) -> int:
    """Number of values in all parameters of `module`, deltas included."""
    return count(module.parameters())


def num_trainable_parameters(module: nn.Module) -> int:
    """Number of values in the parameters that require a gradient."""
    return count(p for p in module.parameters() if p.requires_grad)


def num_frozen_parameters(module: nn.Module) -> int:
    """Number of values in the parameters that require no gradient."""
    return count(p for p in module.parameters() if not p.requires_grad)


def num_delta_parameters(module: nn.Module) -> int:
    """Number of values in the parameters of attached deltas, trainable or not."""
    return count(delta_parameters(module))


def ratio(part: int, whole: int) -> float:
    """``part / whole``, and 0.0 for a module without parameters."""
    return part / whole if whole else 0.0


def state_dict_bytes(module: nn.Module) -> int:
    """Bytes in the tensors that ``module.state_dict()`` would save, each tensor once."""
    if has_distributed(module):  # BMTrain would gather them, which takes all processes
        state = BackboneState.of(module)
        trims = state is not None and state.is_trimmed()
        active = active_names(module, state.constants()) if state is not None else set()
        tensors = [t for name, t in named_tensors(module) if not trims or name in active]
    else:
        tensors = list(module.state_dict(keep_vars=True).values())  # aliases are the same object
    unique = {id(t): t for t in tensors if isinstance(t, Tensor) and not is_lazy(t)}
    return sum(numel(t) * t.element_size() for t in unique.values())


def cpu_memory() -> tuple[float | None, float | None]:
    """GiB that this process has in memory: now, and at most so far; None where unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None, None
    # ru_maxrss is in bytes on macOS and in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_gib = peak * (1 if sys.platform == "darwin" else 1024) / GIB
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return None, peak_gib
    now_gib = int(pages.read_text().split()[1]) * resource.getpagesize() / GIB
    return now_gib, max(now_gib, peak_gib)


def cuda_memory() -> tuple[float, float]:
    """GiB that tensors take on all CUDA devices: now, and at most so far; 0.0 without CUDA."""
    devices = range(torch.cuda.device_count())
    return (
        sum(torch.cuda.memory_allocated(d) for d in devices) / GIB,
        sum(torch.cuda.max_memory_allocated(d) for d in devices) / GIB,
    )


def inspect_module_statistics(module: nn.Module, verbose: bool = True) -> dict[str, Any]:
    """Count the parameters of a model with deltas, and the memory that it takes.

    Args:
        module: usually the backbone with its deltas.
        verbose: log the result at level INFO.

    Returns:
        A dict with

        - ``total_parameters``, ``trainable_parameters``, ``delta_parameters`` (int);
        - ``trainable_ratio``, ``delta_ratio`` (float): their share of the total, 0 to 1;
        - ``state_dict_bytes`` (int): size of what ``module.state_dict()`` holds now, that is of
          the trainable parameters alone after `freeze_module`;
        - ``cudamem``, ``maxcudamem`` (float): GiB allocated on all CUDA devices, now and at most;
        - ``cpumem``, ``maxcpumem`` (float, None where the system does not tell): GiB of main
          memory that this process takes, now and at most.
    """
    statistics, delta = counts(module.parameters()), num_delta_parameters(module)
    cuda, max_cuda = cuda_memory()
    cpu, max_cpu = cpu_memory()
    statistics |= {
        "delta_parameters": delta,
        "delta_ratio": ratio(delta, statistics["total_parameters"]),
        "state_dict_bytes": state_dict_bytes(module),
        "cudamem": cuda,
        "maxcudamem": max_cuda,
        "cpumem": cpu,
        "maxcpumem": max_cpu,
    }
    if verbose:
        logger.info("module: %s", statistics)
    return statistics
