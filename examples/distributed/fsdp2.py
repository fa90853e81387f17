"""LoRA under FSDP2: torchrun --nproc_per_node 2 examples/distributed/fsdp2.py"""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny import backbone, batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from opendelta import AdapterModel, LoraModel


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    model = backbone()
    lora = LoraModel(model, lora_r=4)  # sharded together with its layer
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    adapter = AdapterModel(model, bottleneck_dim=4)  # comes later, and is sharded the same way
    for delta in (lora, adapter):  # each saves the head that it left trainable
        delta.freeze_module(exclude=["deltas", "classifier"])

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    mine = {k: v.to(device) for k, v in batch(dist.get_rank(), dist.get_world_size()).items()}
    for step in range(20):
        loss = model(**mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    for delta in (lora, adapter):  # on all ranks: the first one writes
        delta.save_finetuned(f"delta_checkpoints/delta_fsdp2_{delta.delta_type}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
