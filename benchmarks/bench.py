"""`make bench`: what a delta costs beside the bare frozen backbone, and beside PEFT.

Every figure is a ratio, the median over rounds in which all contenders took turns. ``floor`` is the
frozen backbone with gradients through its activations, which no method can do without.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from contenders import (
    SHAPES,
    Shape,
    contenders,
    floor,
    kept_bytes,
    llama,
    step,
    with_adapter,
    with_lora,
    with_peft,
)
from plot import plot
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import interleaved, ratio
from torch.utils.flop_counter import FlopCounterMode

from opendelta import AutoDeltaModel, LoraModel, deltas


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        item: what was measured.
        base: what the figures are ratios to.
        ours: this library's figure; `peft`: PEFT's, if it has one.
        spread: quartiles of ours.
        target: what ours was to be, in words; `passed`: whether it is.
    """

    item: str
    base: str
    ours: float
    peft: float | None
    spread: str
    target: str
    passed: bool | None


def of_floor(item: str, times: dict[str, list[float]], most: float | None, of_peft: float) -> Row:
    """A row whose contenders are compared with the floor, and ours with PEFT too."""
    ours, theirs = (ratio(times[name], times["floor"]) for name in ("ours", "peft"))
    between = ratio(times["ours"], times["peft"])
    passed = between.middle <= of_peft and (most is None or ours.middle <= most)
    wanted = f"<= {of_peft} x PEFT (is {between.middle:.3f})"
    wanted = wanted if most is None else f"<= {most}, {wanted}"
    return Row(item, "floor", ours.middle, theirs.middle, str(ours), wanted, passed)


def of_peft(item: str, times: dict[str, list[float]], most: float) -> Row:
    """A row in which PEFT is the measure."""
    ours = ratio(times["ours"], times["peft"])
    return Row(item, "PEFT", ours.middle, 1.0, str(ours), f"<= {most} x PEFT", ours.middle <= most)


def calls(models: dict[str, Any], inputs: Any, call: Callable[..., Any]) -> dict[str, Any]:
    return {name: lambda _, model=model: call(model, inputs) for name, model in models.items()}


def training(rounds: int) -> Iterator[Row]:
    for name, shape in SHAPES.items():
        times = interleaved(calls(contenders(shape), shape.inputs(4, 128), step), rounds)
        small = name == "MiniLM"
        yield of_floor(f"training step 4x128, {name}", times, 1.03 if small else None,
                       0.96 if small else 1.0)  # fmt: skip
    for name in ("MiniLM", "LLaMA"):
        shape = SHAPES[name]
        times = interleaved(calls(contenders(shape), shape.inputs(1, 16), step), 8 * rounds)
        yield of_floor(f"training step 1x16, {name}", times, 1.10, 0.96)


def one_linear(rounds: int) -> Iterator[Row]:
    """What LoRA adds to one linear, 4x128 tokens of width 768."""
    shape = Shape(lambda: torch.nn.Sequential(torch.nn.Linear(768, 768)), ("0", "0"))
    shape.targets = ["0"]
    torch.manual_seed(0)
    models = {
        "floor": shape.build().requires_grad_(False),
        "peft": with_peft(shape.build(), ["0"]),
        "ours": with_lora(shape.build(), ["0"]),
    }
    x, grad = torch.randn(4, 128, 768, requires_grad=True), torch.randn(4, 128, 768)

    def both(model: Any, _: None) -> None:
        for _ in range(10):
            model(x).backward(grad)

    times = interleaved(calls(models, None, both), 6 * rounds)
    extra = {
        name: [t - bare for t, bare in zip(times[name], times["floor"], strict=True)]
        for name in ("ours", "peft")
    }
    yield of_peft("extra time of one LoRA linear", extra, 0.5)


def memory(_: int) -> Iterator[Row]:
    """Bytes kept for backward: exact counts, no rounds."""

    def kept(item: str, most: float | None, shape: Shape, **options: Any) -> Row:
        models = contenders(shape, **options)
        counts = {n: kept_bytes(m, shape.inputs(4, 128)) for n, m in models.items()}
        ours, theirs = (counts[name] / counts["floor"] for name in ("ours", "peft"))
        wanted = "<= PEFT" if most is None else f"<= {most}"
        passed = ours <= (theirs if most is None else most)
        return Row(item, "floor", ours, theirs, "exact", wanted, passed)

    for name, shape in SHAPES.items():
        yield kept(f"bytes kept, {name}", None, shape)
    shape = SHAPES["MiniLM"]
    yield kept("bytes kept, lora_dropout=0.1", 1.11, shape, dropout=0.1)
    yield kept("bytes kept, bf16 with fp32 factors", 1.11, shape, dtype=torch.bfloat16)
    targets = ["attention.output.dense", "output.dense"]
    bare = kept_bytes(floor(shape.build(), targets), shape.inputs(4, 128))
    ours = kept_bytes(with_adapter(shape.build(), targets), shape.inputs(4, 128)) / bare
    yield Row("bytes kept, adapter", "floor", ours, None, "exact", "<= 1.15", ours <= 1.15)


def flops(_: int) -> Iterator[Row]:
    shape = SHAPES["MiniLM"]
    counts = {}
    for name, model in contenders(shape).items():
        with FlopCounterMode(display=False) as counter:
            step(model, shape.inputs(4, 128))
        counts[name] = counter.get_total_flops()
    ours, theirs = (counts[name] / counts["floor"] for name in ("ours", "peft"))
    yield Row("operations of a training step", "floor", ours, theirs, "exact", "<= PEFT",
              ours <= theirs)  # fmt: skip


def inference(rounds: int) -> Iterator[Row]:
    shape = SHAPES["MiniLM"]
    models = {name: model.eval() for name, model in contenders(shape).items()}
    inputs = shape.inputs(1, 16)

    def forward(model: Any, inputs: Any) -> None:
        with torch.no_grad():
            for _ in range(5):
                model(**inputs)

    times = interleaved(calls(models, inputs, forward), 8 * rounds)
    yield of_floor("forward 1x16", times, 1.06, 1.0)
    for delta in deltas(models["ours"]):
        delta.merge()
    models["peft"] = models["peft"].merge_and_unload()
    times = interleaved(calls(models, inputs, forward), 8 * rounds)
    ours, theirs = (ratio(times[name], times["floor"]) for name in ("ours", "peft"))
    yield Row("forward 1x16, merged", "floor", ours.middle, theirs.middle, str(ours),
              "1.00 within the quartiles", ours.low <= 1.0)  # fmt: skip


def construction(rounds: int) -> Iterator[Row]:
    targets = ["q_proj", "v_proj"]
    ways = {
        "ours": lambda model: with_lora(model, targets),
        "peft": lambda model: with_peft(model, targets),
    }
    for modules in (24, 96, 384):
        times = interleaved(ways, rounds, lambda _, n=modules: llama(64, n // 2))
        yield of_peft(f"attach and freeze, {modules} modules", times, 0.2)


def files(rounds: int) -> Iterator[Row]:
    shape = SHAPES["MiniLM"]
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("ours", "peft")}
        lora, theirs = (
            with_lora(shape.build(), shape.targets),
            with_peft(shape.build(), shape.targets),
        )
        (delta,) = deltas(lora)
        delta.save_finetuned(places["ours"])  # hashes the backbone once

        def save(_: Any) -> None:
            delta.save_finetuned(places["ours"])

        saving: dict[str, Callable[[Any], Any]] = {
            "ours": save,
            "peft": lambda _: theirs.save_pretrained(str(places["peft"])),
        }
        yield of_peft("save, hash cached", interleaved(saving, 4 * rounds), 0.25)

        def load(check: bool) -> Callable[[Any], Any]:
            return lambda m: AutoDeltaModel.from_finetuned(
                places["ours"], backbone_model=m, check_hash=check
            )

        def hash_all(model: Any) -> None:
            md5 = hashlib.md5()
            for p in model.parameters():
                md5.update(p.detach().numpy().data)

        torch.manual_seed(0)
        known = shape.build()
        places["known"] = Path(folder) / "known"
        LoraModel(known, modified_modules=shape.targets).save_finetuned(places["known"])
        ways: dict[str, Callable[[Any], Any]] = {
            "ours": load(False),
            "peft": lambda m: peft.PeftModel.from_pretrained(m, str(places["peft"])),
            "md5": hash_all,
        }

        def fresh(name: str) -> Any:
            torch.manual_seed(0)
            return shape.build()

        times = interleaved(ways, 2 * rounds, fresh)
        yield of_peft("load, hash off", times, 0.25)

        def verified(model: Any) -> None:
            AutoDeltaModel.from_finetuned(places["known"], backbone_model=model)

        again = fresh("")
        verified(again)
        ways = {"ours": load(False), "md5": hash_all, "verified": verified, "second": verified}
        times = interleaved(ways, 2 * rounds, lambda n: again if n == "second" else fresh(n))
        allowed = [a + 1.05 * b for a, b in zip(times["ours"], times["md5"], strict=True)]
        yield of_base("verified load", times["verified"], allowed, "load + 1.05 md5", 1.0)
        yield of_base("verified load, again", times["second"], allowed, "load + 1.05 md5", 0.5)


def of_base(item: str, times: list[float], of: list[float], base: str, most: float) -> Row:
    ours = ratio(times, of)
    return Row(item, base, ours.middle, None, str(ours), f"<= {most}", ours.middle <= most)


def switching(rounds: int) -> Iterator[Row]:
    shape = SHAPES["MiniLM"]
    lora, theirs = with_lora(shape.build(), shape.targets), with_peft(shape.build(), shape.targets)
    (delta,) = deltas(lora)

    def ours(_: Any) -> None:
        delta.detach()
        delta.attach()

    def peft_(_: Any) -> None:
        with theirs.disable_adapter():
            pass

    times = interleaved({"ours": ours, "peft": peft_}, 20 * rounds)
    yield of_peft("detach and attach, 12 modules", times, 0.1)


PARTS = (training, one_linear, memory, flops, inference, construction, files, switching)


def table(rows: list[Row]) -> Table:
    shown = Table(title="Cost of LoRA (r=8 on query and value), as a ratio", show_lines=False)
    for column in ("item", "ratio to", "OpenDelta", "(quartiles)", "PEFT", "target", ""):
        shown.add_column(column)
    for row in rows:
        theirs = "" if row.peft is None else f"{row.peft:.3f}"
        mark = "" if row.passed is None else ("[green]pass" if row.passed else "[red]missed")
        spread = row.spread.partition(" ")[2] or row.spread
        shown.add_row(row.item, row.base, f"{row.ours:.3f}", spread, theirs, row.target, mark)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a delta beside PEFT and the backbone.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [part for part in PARTS if options.only in (None, part.__name__)]
    rows = [row for part in track(chosen, "measuring") for row in part(options.rounds)]
    console = Console(width=140)
    console.print(table(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version(),
        "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg(),
        "rounds": options.rounds,
    }  # fmt: skip
    found = {"machine": machine, "rows": [asdict(row) for row in rows]}
    (options.out / "bench.json").write_text(json.dumps(found, indent=2) + "\n")
    (options.out / "bench.svg").write_text(plot(rows))
    console.print(f"Written: {options.out}/bench.json and bench.svg")


if __name__ == "__main__":
    main()
