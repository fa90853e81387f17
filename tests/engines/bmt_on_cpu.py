"""BMTrain 1.0.1's own Python code on a CPU: gloo in the place of NCCL, no-ops for CUDA's streams.

`install()` goes before anything that imports bmtrain, in a process of its own, since it patches
torch for good; then ``bmtrain.init_distributed(seed=0)``, under torchrun or alone. Pipelines
(send and receive), races between streams and fp16's loss scaling on a device are not covered.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # it lists torch's functions when first imported: as they are, not as patched
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

DTYPES = "Float Double Half BFloat16 Char Byte Short Int".split()
OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,  # divided afterwards: gloo has no average
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "prod": dist.ReduceOp.PRODUCT,
}


class Anything:
    """A stream or an event: each of its methods does nothing."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class CudaOnCpu(TorchFunctionMode):
    """Lets code that says "cuda" run on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **kwargs)


def over(storage: Any) -> Tensor:
    """A flat tensor over a typed storage, which is how BMTrain hands its data to NCCL."""
    return torch.tensor([], dtype=storage.dtype).set_(storage)


def nccl_on_gloo() -> types.ModuleType:
    """A module with the functions of `bmtrain.nccl` that training without pipelines calls."""

    def start(uid: bytes, world: int, rank: int) -> Any:
        if not dist.is_initialized():
            store = dist.FileStore(uid.decode(), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            atexit.register(dist.destroy_process_group)  # or gloo's threads outlive the interpreter
        return nccl.NCCLCommunicator()

    def reduced(source: Any, operation: str) -> Tensor:
        total = over(source).clone()
        dist.all_reduce(total, OPERATIONS[operation])
        return total / dist.get_world_size() if operation == "avg" else total

    def all_reduce(source: Any, target: Any, operation: str, _: Any) -> None:
        over(target).copy_(reduced(source, operation))

    def reduce_scatter(source: Any, target: Any, operation: str, _: Any) -> None:
        parts = reduced(source, operation).chunk(dist.get_world_size())
        over(target).copy_(parts[dist.get_rank()])

    def all_gather(source: Any, target: Any, _: Any) -> None:
        dist.all_gather(list(over(target).view(dist.get_world_size(), -1)), over(source))

    def broadcast(source: Any, target: Any, root: int, _: Any) -> None:
        over(target).copy_(over(source))
        dist.broadcast(over(target), root)

    nccl: Any = types.ModuleType("bmtrain.nccl")
    nccl.NCCLCommunicator = type("NCCLCommunicator", (), {})
    nccl.getUniqueId = lambda: str(Path(tempfile.mkdtemp()) / "store").encode()
    nccl.commInitRank, nccl.allReduce, nccl.reduceScatter = start, all_reduce, reduce_scatter
    nccl.allGather, nccl.broadcast = all_gather, broadcast
    nccl.commCount = lambda _: dist.get_world_size()
    nccl.commRank = lambda _: dist.get_rank()
    nccl.groupStart = nccl.groupEnd = nccl.commDestroy = lambda *args: None
    nccl.send = nccl.recv = nccl.reduce = None
    return nccl


def install() -> Any:
    """Patch torch and return the module `bmtrain`."""
    cuda: Any = torch.cuda
    for name in DTYPES:
        setattr(cuda, name + "Storage", getattr(torch, name + "Storage"))
    cuda.FloatTensor = torch.FloatTensor
    cuda.Stream = cuda.Event = Anything
    cuda.current_stream = lambda *args: Anything()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.set_device = cuda.synchronize = lambda device=None: None
    cuda.current_device = lambda: 0
    cuda.get_rng_state = lambda: torch.get_rng_state()
    cuda.set_rng_state = lambda state: torch.set_rng_state(state)
    fork = torch.random.fork_rng
    random: Any = torch.random
    random.fork_rng = lambda devices=(), enabled=True, **rest: fork((), enabled)
    sys.modules["bmtrain.nccl"] = nccl = nccl_on_gloo()
    try:  # the C extension, which fp16 Adam on the CPU needs, loads only where libnccl does
        import nvidia.nccl

        ctypes.CDLL(next(iter(nvidia.nccl.__path__)) + "/lib/libnccl.so.2")
    except (ImportError, OSError):
        sys.modules["bmtrain.C"] = types.ModuleType("bmtrain.C")

    # Modes are off within Tensor.backward; BMTrain's backward functions need this one.
    run = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with CudaOnCpu():
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward  # type: ignore[attr-defined]
    CudaOnCpu().__enter__()
    import bmtrain

    bmtrain.nccl = nccl
    return bmtrain
