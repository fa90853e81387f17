"""Train a task in many ways, one JSON file for each, and compare them.

    python examples/run.py text_classification               # all files of that folder
    python examples/run.py seq2seq lora adapter              # two of them

A file names the delta (a config as `AutoDeltaConfig.from_dict` takes it, or null, and then what
``trains``) and the learning rate. The results are shown, and kept as JSON and as a plot.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from plot import Point, scatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from tasks import TASKS, Task
from torch import Tensor, nn

from opendelta import AutoDeltaModel, num_total_parameters, num_trainable_parameters

HERE = Path(__file__).parent
console = Console()
Row = dict[str, Any]


def train(model: nn.Module, task: Task, rate: float, way: str) -> float:
    """Train what requires grad, an ordinary loop, and return the processor's seconds it took."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    batches = list(task.batches())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=len(batches))
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    model.train()
    torch.manual_seed(0)
    began = time.process_time()  # what else the machine does is not counted
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[loss]}")) as progress:
        bar = progress.add_task(f"{way:18}", total=len(batches), loss="")
        for batch in batches:
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, loss=f"loss {loss.item():.3f}")
    return time.process_time() - began


def training_bytes(model: nn.Module, task: Task) -> int:
    """What training holds beside the weights: counted, for the first batch.

    That is what autograd keeps for backward, and for each trained parameter its gradient and the
    two moments of AdamW.
    """
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(model, next(task.batches()))  # held here, so that no storage is reused
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert loss.requires_grad
    return sum(kept.values()) + 3 * trained


def measure(task: Task, file: Path) -> Row:
    """Train in the way that a file describes; accuracy, and what it costs."""
    config = json.loads(file.read_text())
    model = task.model()
    delta = None
    if config["delta"] is not None:
        delta = AutoDeltaModel.from_config(config["delta"], model)
        delta.freeze_module(exclude=["deltas", *task.head])
    elif config["trains"] == "head":
        for name, p in model.named_parameters():
            p.requires_grad = name.split(".")[0] in task.head
    trained, total = num_trainable_parameters(model), num_total_parameters(model)
    memory = training_bytes(model.train(), task)
    seconds = train(model, task, config["learning_rate"], file.stem)
    model.eval()
    accuracy = task.accuracy(model)
    with tempfile.TemporaryDirectory() as folder:
        if delta is not None:
            delta.save_finetuned(folder)
        else:
            weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            save_file(weights, Path(folder, "model.safetensors"))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "method": file.stem.replace("_", " "),
        "accuracy": accuracy,
        "trainable_parameters": trained,
        "percent": 100 * trained / total,
        "CPU_seconds": round(seconds, 1),
        "memory_MB": round(memory / 1e6, 1),
        "file_kB": round(size / 1000),
    }


def show(title: str, rows: list[Row]) -> None:
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title)
    for row in rows:
        cells = (f"{v:,.3f}" if isinstance(v, float) else f"{v:,}" for v in list(row.values())[1:])
        table.add_row(row["method"], *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways of tuning on a task.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("ways", nargs="*", help="files of the task's folder, default: all")
    parser.add_argument("--quick", action="store_true", help="a few steps, to try the code")
    parser.add_argument("--results", type=Path, default=Path("delta_checkpoints/results.json"))
    parser.add_argument("--plot", type=Path, default=Path("delta_checkpoints/results.svg"))
    options = parser.parse_args()

    folder = HERE / options.task
    files = [folder / f"{way}.json" for way in options.ways] or sorted(folder.glob("*.json"))
    task = TASKS[options.task](options.quick)
    rows = sorted((measure(task, file) for file in files), key=lambda row: -row["accuracy"])
    show(options.task, rows)
    points = [Point(r["method"], r["trainable_parameters"], r["accuracy"]) for r in rows]
    for path, content in (
        (options.results, json.dumps(rows, indent=1) + "\n"),
        (options.plot, scatter(points)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        console.print(f"Written: {path}")


if __name__ == "__main__":
    main()
