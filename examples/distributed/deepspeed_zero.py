"""LoRA under ZeRO: torchrun --nproc_per_node 2 examples/distributed/deepspeed_zero.py [2 or 3]"""

from __future__ import annotations

import sys

import deepspeed
import torch
from tiny import backbone, batch

from opendelta import LoraModel


def main(stage: int) -> None:
    deepspeed.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    model = backbone()
    delta = LoraModel(model, lora_r=4)  # before the engine, which takes no more parameters
    delta.freeze_module(exclude=["deltas", "classifier"])
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,  # a plain torch optimizer on CPU too
            "zero_allow_untested_optimizer": True,
        },
    )

    mine = {k: v.to(engine.device) for k, v in batch(rank, world).items()}
    for step in range(20):
        loss = engine(**mine).loss
        engine.backward(loss)
        engine.step()
        if rank == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    # on all ranks: the first one writes
    delta.save_finetuned(f"delta_checkpoints/delta_zero{stage}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
