"""`make bench-gpu`: a training step of LoRA on all linears of a LLaMA-shaped backbone, beside PEFT.

By default the backbone has a billion parameters in bf16 and needs a GPU; smaller ones run anywhere:

    python benchmarks/gpu.py --width 128 --layers 2 --device cpu
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from contenders import floor, step
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from timing import interleaved, ratio
from transformers import LlamaConfig, LlamaModel

from opendelta import LoraModel

LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA on all linears of a LLaMA-shaped backbone.")
    sizes = {"width": 2048, "layers": 16, "rows": 4, "tokens": 1024, "rounds": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
    )
    torch.manual_seed(0)
    with device:
        backbone = LlamaModel(config).to(torch.bfloat16).train()
    ours: Any = copy.deepcopy(backbone)
    LoraModel(ours, modified_modules=LINEARS).freeze_module(set_state_dict=False)
    theirs: Any = get_peft_model(
        copy.deepcopy(backbone),
        LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS),
        autocast_adapter_dtype=False,  # factors in bf16, as ours
    )
    models: dict[str, Any] = {
        "frozen backbone": floor(backbone, LINEARS),
        "PEFT": theirs,
        "OpenDelta": ours,
    }
    ids = torch.randint(32000, (options.rows, options.tokens), device=device)

    def timed(model: Any) -> Any:
        def one(_: Any) -> None:
            step(model, {"input_ids": ids})
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return one

    times = interleaved({name: timed(model) for name, model in models.items()}, options.rounds)
    million = sum(p.numel() for p in backbone.parameters()) / 1e6
    table = Table(title=f"{million:.0f} million parameters in bf16, {device}", show_lines=False)
    for column in ("", "step", "tokens/s", "ratio to the backbone", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    for name, model in models.items():
        peak = "-"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            timed(model)(None)
            peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
        middle = sorted(times[name])[len(times[name]) // 2]
        table.add_row(
            name,
            f"{1e3 * middle:.1f} ms",
            f"{options.rows * options.tokens / middle:,.0f}",
            str(ratio(times[name], times["frozen backbone"])),
            peak,
        )
    Console().print(table)


if __name__ == "__main__":
    main()
