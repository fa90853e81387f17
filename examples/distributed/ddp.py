"""LoRA under DistributedDataParallel: torchrun --nproc_per_node 2 examples/distributed/ddp.py"""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny import backbone, batch
from torch.nn.parallel import DistributedDataParallel

from opendelta import LoraModel


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")

    model = backbone().to(device)
    delta = LoraModel(model, lora_r=4)  # before DDP, which must know its parameters
    delta.freeze_module(exclude=["deltas", "classifier"])
    wrapped = DistributedDataParallel(model)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    mine = {k: v.to(device) for k, v in batch(dist.get_rank(), dist.get_world_size()).items()}
    for step in range(20):
        loss = wrapped(**mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    if dist.get_rank() == 0:
        delta.save_finetuned("delta_checkpoints/delta_ddp")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # after DDP is gone: the other way round gloo may hang
