"""On the engines: moved statistics, and a head of its own, come and go with a delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from refusals import initialised
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import sgd

import opendelta


class Net(nn.Module):
    """A convolution, a batch norm, a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))
        return out


def on(engine: str, model: nn.Module) -> tuple[nn.Module, Any]:
    """What is called in the model's place, and what takes a step."""
    if engine.startswith("zero"):
        wrapper = initialised(model, int(engine[-1]))

        def step(loss: Tensor) -> None:
            wrapper.backward(loss)
            wrapper.step()

        return wrapper, step
    if engine == "ddp":
        wrapper = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (model.conv, model.norm, model):
            fully_shard(part, mesh=mesh)
        wrapper = model
    optimizer = sgd(model)

    def plain_step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return wrapper, plain_step


@torch.no_grad()
def moved_buffers(engine: str, folder: Path) -> dict[str, Any]:
    """How far outputs are from those that they are to equal, on the first rank or on both.

    The case is an engine; ``" with a head"`` after it has the delta own the last linear.
    """
    engine, _, with_head = engine.partition(" with a ")
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(3)) * 2 + 1
    bare = Net().eval()(x)
    model = Net()
    delta = opendelta.LoraModel(
        model, modified_modules=["conv"], lora_r=2, own_modules=["fc"] if with_head else None
    )
    delta.freeze_module()
    run, step = on(engine, model)

    def train() -> None:
        run.train()
        for _ in range(2):
            with torch.enable_grad():
                step(run(x[dist.get_rank() :: 2]).square().mean())
        run.eval()

    train()
    tuned = run(x)
    if engine in ("fsdp2", "zero3") or dist.get_rank() == 0:
        delta.save_finetuned(folder)
    dist.barrier()
    delta.detach()
    off = run(x)
    delta.attach()
    again = run(x)
    plain = Net()
    loaded = opendelta.AutoDeltaModel.from_finetuned(folder, backbone_model=plain)
    of_file = plain(x)
    loaded.detach()
    train()
    delta.load_checkpoint(folder)
    told = [
        {
            "moved": not torch.equal(model.norm.running_mean, torch.zeros(8)),
            "again": torch.equal(again, tuned),
            "the file": (of_file - tuned).abs().max().item(),
            "a plain one detached": torch.equal(plain(x), bare),
        }
    ]
    dist.broadcast_object_list(told)
    return {
        **told[0],
        "detached": torch.equal(off, bare),
        "loaded": (run(x) - of_file).abs().max().item() < 1e-6,
    }
