"""LoRA on a split LLaMA: torchrun --nproc_per_node 2 examples/distributed/tensor_parallel.py"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from opendelta import LoraModel

FOLDER = "delta_checkpoints/tiny_llama"


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank() == 0:  # in place of a model that is worth splitting
        torch.manual_seed(0)
        sizes: Any = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(FOLDER)
    dist.barrier()

    model = AutoModelForCausalLM.from_pretrained(FOLDER, tp_plan="auto", dtype=torch.float32)
    delta = LoraModel(model, lora_r=4, modified_modules=["q_proj", "o_proj", "mlp"])
    delta.freeze_module()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (8, 12), generator=generator).to(model.device)
    for step in range(20):  # every rank has the same rows
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    # on all ranks: the first one writes
    delta.save_finetuned("delta_checkpoints/delta_tensor_parallel")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
