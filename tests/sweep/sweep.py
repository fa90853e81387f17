"""Every method with its defaults on every architecture that can be built tiny and run.

`python tests/sweep/sweep.py` prints the table and a reason for whatever does not pass;
`python tests/sweep/sweep.py bert gpt2 --methods lora prefix` looks at some of it. The columns:

- placed: the constructor succeeds.
- identity: a delta that adds nothing leaves the outputs as they are, to 1e-5. LoRA and BitFit add
  nothing as constructed; the adapters with all their parameters at zero. Prefixes and soft prompts
  always add something: they have no such column.
- alive: after all parameters of the delta were moved at random, the outputs differ.
- gradients: after `freeze_module` and a backward, all parameters of the delta have a finite
  gradient, those on most modules one that is not zero, and the backbone's parameters have none.
- detach/attach: detached, the outputs are those of the bare backbone, bit by bit; attached again,
  those from before.
- save/load: saved and loaded onto a fresh backbone, the delta gives the same outputs, to 1e-5.

Prefixes apply where some attention is (see `placement.attentions`), soft prompts where the input
is token ids or their embeddings. The tiny backbones have room for the 100 tokens of a default soft
prompt; some real ones have not (77 positions in CLIP's text model), and need a shorter prompt.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import logging

sys.path.insert(0, str(Path(__file__).parent))

import placement  # these two are found by the line above
import tiny

from opendelta import AutoDeltaModel, DeltaBase
from opendelta.auto_delta import REGISTRY

METHODS = (
    "lora",
    "adapter",
    "low_rank_adapter",
    "compacter",
    "parallel_adapter",
    "bitfit",
    "prefix",
    "soft_prompt",
)
COLUMNS = ("placed", "identity", "alive", "gradients", "detach/attach", "save/load")
ROUNDING = 1e-5

# Column -> why it does not pass, or None if it does; without the columns that do not apply.
Result = dict[str, "str | None"]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, in order; caches are left out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)


def run(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What a model makes of its input; models that draw at random draw the same each time."""
    torch.manual_seed(0)
    return list(tensors_in(model(**copy.deepcopy(inputs))))


def same(these: list[Tensor], those: list[Tensor], tolerance: float = 0.0) -> bool:
    """Whether two outputs are equal, not-a-numbers in the same places included."""
    return len(these) == len(those) and all(
        a.shape == b.shape and torch.allclose(a, b, tolerance, tolerance, equal_nan=True)
        for a, b in zip(these, those, strict=True)
    )


def told(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


class Trial:
    """One method on one architecture.

    Args:
        model_type: the architecture.
        method: the `delta_type`.
        inputs: what its backbones are run on.
    """

    def __init__(self, model_type: str, method: str, inputs: dict[str, Tensor]) -> None:
        self.model_type, self.method, self.inputs = model_type, method, inputs
        self.model = tiny.backbone(model_type)
        frozen = tiny.backbone(model_type).requires_grad_(False)  # torch adds those up otherwise
        with torch.no_grad():
            self.bare = run(frozen, inputs)
        self.delta: DeltaBase

    def result(self) -> Result:
        """Which columns pass. They are looked at in order, each after the others' changes."""
        checks: dict[str, Callable[[], str | None]] = {
            "placed": self.placed,
            "identity": self.identity,
            "alive": self.alive,
            "gradients": self.gradients,
            "detach/attach": self.detach_attach,
            "save/load": self.save_load,
        }
        if self.method in ("prefix", "soft_prompt"):
            del checks["identity"]
        result: Result = {}
        for column, check in checks.items():
            if column != "placed" and result["placed"]:
                result[column] = "not placed"
                continue
            try:
                result[column] = check()
            except Exception as error:  # whatever goes wrong is what the table is about
                result[column] = told(error)
        return result

    def outputs(self) -> list[Tensor]:
        with torch.no_grad():
            return run(self.model, self.inputs)

    def placed(self) -> None:
        torch.manual_seed(1)
        self.delta = REGISTRY[self.method](self.model)
        self.delta.freeze_module()

    def identity(self) -> str | None:
        start = [p.detach().clone() for p in self.delta.parameters()]
        with torch.no_grad():
            if self.method not in ("lora", "bitfit"):
                for p in self.delta.parameters():
                    p.zero_()
            outputs = self.outputs()
            for p, value in zip(self.delta.parameters(), start, strict=True):
                p.copy_(value)
        return None if same(outputs, self.bare, ROUNDING) else "a neutral delta changes the output"

    def alive(self) -> str | None:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in self.delta.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
        return "the output stays the same" if same(self.outputs(), self.bare) else None

    def gradients(self) -> str | None:
        outputs = [o for o in run(self.model, self.inputs) if o.requires_grad]
        if not outputs:
            return "no output has a gradient"
        generator = torch.Generator().manual_seed(3)
        weighted = [o.float() * torch.randn(o.shape, generator=generator) for o in outputs]
        torch.stack([w.sum() for w in weighted]).sum().backward()
        grads = {name: p.grad for name, p in self.delta.named_parameters()}
        own = {id(p) for p in self.delta.parameters()}
        if missing := [name for name, grad in grads.items() if grad is None]:
            return f"no gradient in {len(missing)} of {len(grads)}: {missing[0]}"
        if wild := [n for n, g in grads.items() if g is not None and not g.isfinite().all()]:
            return f"infinite gradient in {len(wild)} of {len(grads)}: {wild[0]}"
        hosts = {name.rpartition(".")[0] for name in grads}
        moved = {n.rpartition(".")[0] for n, g in grads.items() if g is not None and g.any()}
        if 2 * len(moved) <= len(hosts):
            return f"zero gradient on {len(hosts - moved)} of {len(hosts)} modules"
        others = [n for n, p in self.model.named_parameters() if id(p) not in own]
        leaked = [n for n in others if self.model.get_parameter(n).grad is not None]
        return f"the backbone's {leaked[0]} has a gradient" if leaked else None

    def detach_attach(self) -> str | None:
        before = self.outputs()
        self.delta.detach()
        if not same(self.outputs(), self.bare):
            return "detached, the output is not the bare one"
        self.delta.attach()
        return None if same(self.outputs(), before) else "attached again, the output is another"

    def save_load(self) -> str | None:
        before = self.outputs()
        with tempfile.TemporaryDirectory() as folder:
            self.delta.save_finetuned(folder)
            self.model = tiny.backbone(self.model_type)
            AutoDeltaModel.from_finetuned(folder, backbone_model=self.model).freeze_module()
        return None if same(self.outputs(), before, ROUNDING) else "loaded, the output is another"


def applies(method: str, model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a method can be expected to work on a backbone."""
    if method == "prefix":
        return any(True for _ in placement.attentions(model))
    if method == "soft_prompt":
        return not {"input_ids", "inputs_embeds"}.isdisjoint(inputs)
    return True


def examine(model_type: str, methods: tuple[str, ...] = METHODS) -> dict[str, Result] | str:
    """The result of each method that applies to an architecture, or why that does not run."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny.backbone(model_type)
            inputs = tiny.batch(model)
        except Exception as error:  # a default config that its own model refuses, a missing package
            return told(error)
        return {
            method: Trial(model_type, method, inputs).result()
            for method in methods
            if applies(method, model, inputs)
        }


def sweep(
    model_types: list[str], methods: tuple[str, ...] = METHODS, processes: int = 2
) -> dict[str, dict[str, Result]]:
    """The results of all architectures that run, by their types."""
    found: dict[str, dict[str, Result]] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        examined = pool.map(examine, model_types, itertools.repeat(methods))
        progress = track(
            examined, "sweep", total=len(model_types), console=Console(stderr=True), transient=True
        )
        for model_type, results in zip(model_types, progress, strict=True):
            if isinstance(results, str):
                print(f"{model_type}: does not run: {results:.150}", file=sys.stderr)
            else:
                found[model_type] = results
    return found


def failures(found: Mapping[str, dict[str, Result]], method: str) -> dict[str, Result]:
    """The columns that a method does not pass, by architecture."""
    failed = {
        model_type: {column: why for column, why in results[method].items() if why}
        for model_type, results in found.items()
        if method in results
    }
    return {model_type: columns for model_type, columns in failed.items() if columns}


def table(found: Mapping[str, dict[str, Result]]) -> Table:
    """For each method and column, how many architectures pass of those that it applies to."""
    drawn = Table("method", *COLUMNS, "all", title=f"{len(found)} architectures")
    for method in METHODS:
        results = [by_method[method] for by_method in found.values() if method in by_method]
        cells = [[result[c] is None for result in results if c in result] for c in COLUMNS]
        cells.append([not any(result.values()) for result in results])
        if results:
            drawn.add_row(method, *(f"{sum(c)}/{len(c)}" if c else "-" for c in cells))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method's defaults on every architecture.")
    parser.add_argument("model_types", nargs="*", help="types of model; all that are known")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file to write all results to")
    options = parser.parse_args()
    model_types = options.model_types or tiny.model_types()
    found = sweep(model_types, tuple(options.methods), options.processes)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    Console(width=110).print(table(found))
    for method in options.methods:
        for model_type, columns in failures(found, method).items():
            column, why = next(iter(columns.items()))
            print(f"{method:17} {model_type:28} {column}: {why:.300}")


if __name__ == "__main__":
    main()
