"""LoRA with Accelerate: torchrun --nproc_per_node 2 examples/distributed/accelerate_.py

`accelerate launch` runs it as well, but ``--cpu --num_processes 2`` starts one process only.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from tiny import backbone, batch

from opendelta import LoraModel


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())

    model = backbone()
    delta = LoraModel(model, lora_r=4)  # before prepare
    delta.freeze_module(exclude=["deltas", "classifier"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)

    mine = batch(accelerator.process_index, accelerator.num_processes)
    mine = {key: value.to(accelerator.device) for key, value in mine.items()}
    for step in range(20):
        loss = prepared(**mine).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")

    if accelerator.is_main_process:
        delta.save_finetuned("delta_checkpoints/delta_accelerate")
    prepared, optimizer = accelerator.free_memory(prepared, optimizer)  # DDP before its processes
    accelerator.end_training()


if __name__ == "__main__":
    main()
