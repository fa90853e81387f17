"""Serving many LoRAs on one backbone: switching, mixed batches, memory, beside PEFT.

    python benchmarks/serving.py [--width 512] [--layers 8] [--tokens 32] [--rounds 15]

One backbone holds 64 LoRAs, a copy of it the same ones through PEFT. All ways of computing a batch
of 32 rows with 8 of them are timed in turns, round by round, so that whatever else the machine does
meets all alike. Before, their logits are compared.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import opendelta
from opendelta import LoraModel

DELTAS, ROWS, IN_BATCH = 64, 32, 8


def tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    stores = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name, default in {"width": 512, "layers": 8, "tokens": 32, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=8,
    )
    model: Any = LlamaForCausalLM(config).eval()
    rival: Any = copy.deepcopy(model)

    def one_more() -> LoraModel:
        delta = LoraModel(model, modified_modules=["q_proj", "v_proj"])
        delta.detach()
        return delta

    deltas = [one_more() for _ in range(DELTAS - 1)]
    before = tensor_bytes()
    deltas.append(one_more())
    added = tensor_bytes() - before
    names = [f"task{number}" for number in range(DELTAS)]
    peft_config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    rival = get_peft_model(rival, peft_config, adapter_name=names[0]).eval()
    for name in names[1:]:
        rival.add_adapter(name, peft_config)
    for delta, name in zip(deltas, names, strict=True):
        for own_name, p in delta.named_parameters():
            torch.nn.init.normal_(p, std=0.02)
            place, _, matrix = own_name.partition(".lora.")
            host = rival.base_model.model.get_submodule(place)
            getattr(host, matrix)[name].weight.copy_(p)
    modules = len(deltas[0].insertions)

    ids = torch.randint(1000, (ROWS, sizes.tokens))
    of_row = [row % IN_BATCH for row in range(ROWS)]

    def mixed() -> Tensor:
        with opendelta.route(model, [deltas[number] for number in of_row]):
            logits: Tensor = model(ids).logits
        return logits

    def apart() -> Tensor:
        logits = torch.empty(ROWS, sizes.tokens, 1000)
        for number in range(IN_BATCH):
            with deltas[number].attached():
                logits[number::IN_BATCH] = model(ids[number::IN_BATCH]).logits
        return logits

    def switch() -> None:
        deltas[0].attach()
        deltas[0].detach()

    switches = {
        "OpenDelta: attach and detach": switch,
        "PEFT: set_adapter": lambda: rival.set_adapter(names[1]),
    }
    batches = {
        "backbone alone": lambda: model(ids).logits,
        "OpenDelta: route": mixed,
        "PEFT: adapter_names": lambda: (
            rival(ids, adapter_names=[names[number] for number in of_row]).logits
        ),
        f"{IN_BATCH} separate forwards": apart,
    }
    expected = apart()
    for name, way in batches.items():  # all the same, but without deltas
        assert ((way() - expected).abs().max() < 1e-4) == (name != "backbone alone"), name
    load = os.getloadavg()[0]
    table = Table(
        title=f"{DELTAS} LoRAs on one Llama of {sizes.layers} layers, width {sizes.width}",
        caption=f"median (quartiles) of {sizes.rounds} rounds; {torch.get_num_threads()} threads, "
        f"{os.cpu_count()} cores, load {load:.1f} before and {{after:.1f}} after",
    )
    for column in ("what", "time", "quartiles"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for ways, unit, scale in ((switches, "µs a module", 1e6 / modules), (batches, "ms", 1e3)):
        for name, times in interleaved(ways, sizes.rounds).items():
            low, middle, high = (scale * q for q in statistics.quantiles(times, n=4))
            table.add_row(name, f"{middle:.1f} {unit}", f"{low:.1f} to {high:.1f}")
        table.add_section()
    parameters = sum(p.nbytes for p in deltas[-1].parameters())
    table.add_row("bytes of one more delta", f"{added:,}", f"parameters: {parameters:,}")
    table.caption = str(table.caption).format(after=os.getloadavg()[0])
    Console().print(table)


if __name__ == "__main__":
    main()
