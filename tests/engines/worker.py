"""What each of two processes does in the tests of the engines; started by `torchrun`.

``torchrun --nproc_per_node 2 tests/engines/worker.py ENGINE FOLDER`` (for Ray: without torchrun),
with the checkout and ``tests/golden`` on the ``PYTHONPATH``, runs the cases of one entry of
`ENGINES` and writes what each rank returned, or what went wrong, to ``FOLDER/results.json``. Most
train a method for five steps and save it from all ranks into ``FOLDER/case``.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moving
import on_shards
import refusals
import splitting
import torch
import torch.distributed as dist
import training

RESCALING = ("DoRA", "IA3")  # where parameters are whole only while a module runs
OF_METHODS = tuple(method for method in training.METHODS if method not in RESCALING)
AFTERWARDS = tuple(method for method in OF_METHODS if method != "SoftPrompt")
DIFFERENCES = ("methods", "arguments", "shapes", "failures")
MOVING = ("ddp", "fsdp2", "zero2", "zero3")
LOADS = ("stale", "missing", "damaged", "into a delta")
REFUSED_BY_FSDP2 = ("a new bias", "shared parameters", "a soft prompt", "two meshes")
ENGINES: dict[str, tuple[Callable[[str, Path], Any], tuple[str, ...]]] = {
    "ddp": (training.trains(training.ddp), OF_METHODS),
    "fsdp2": (training.trains(training.fsdp2), (*OF_METHODS[:-1], *RESCALING)),
    "fsdp2_network": (refusals.fsdp2_network, ("before",)),
    "fsdp2_afterwards": (training.trains(training.fsdp2_afterwards), (*AFTERWARDS, *RESCALING)),
    "fsdp2_detached": (training.trains(training.fsdp2_detached), AFTERWARDS),
    "fsdp2_late": (training.trains(training.fsdp2_late), AFTERWARDS),
    "accelerate": (training.trains(training.accelerate), OF_METHODS),
    "ray": (training.trains(training.ray_train), OF_METHODS),
    "trainer": (training.trainer, OF_METHODS),
    "zero2": (training.trains(training.zero(2)), OF_METHODS),
    "zero3": (training.trains(training.zero(3)), (*OF_METHODS, *RESCALING)),
    "zero3_early": (training.trains(training.zero(3, partitioned=True)), OF_METHODS),
    "zero_switched": (on_shards.zero_switched, ("2", "3")),
    "tensor_parallel": (splitting.tensor_parallel, tuple(splitting.PLANS)),
    "split_loads": (splitting.split_loads, tuple(splitting.PLANS)),
    "refused_on_split": (refusals.refused_on_split, OF_METHODS[2:]),
    "put_after_ddp": (refusals.put_after_ddp, ("wrapper", "module", "looked at", "attached")),
    "refused_on_fsdp1": (refusals.refused_on_fsdp1, ("flat", "originals")),
    "refused_on_fsdp2": (refusals.refused_on_fsdp2, REFUSED_BY_FSDP2),
    "fsdp2_own_layer": (on_shards.fsdp2_own_layer, ("before", "afterwards")),
    "fsdp2_precision": (on_shards.fsdp2_precision, ("LoRA", "Adapter")),
    "ranks_that_differ": (refusals.ranks_that_differ, DIFFERENCES),
    "put_after_zero": (refusals.put_after_zero, ("new", "engine", "detached")),
    "put_after_zero2": (refusals.put_after_zero2, ("Adapter", "BitFit", "attached")),
    "hashes": (on_shards.hashes, ("fsdp2", "zero3", "split")),
    "unwritable": (refusals.unwritable, ("fsdp2", "zero3", "a foreign folder")),
    "loads_that_differ": (refusals.loads_that_differ, LOADS),
    "after_a_forward": (on_shards.after_a_forward, ("load", "switch", "hash", "callback", "save")),
    "two_meshes": (on_shards.two_meshes, ("LoRA",)),
    "beside_a_split": (splitting.beside_a_split, ("Adapter",)),
    "moved_buffers": (moving.moved_buffers, (*MOVING, *(f"{e} with a head" for e in MOVING))),
    "switched": (on_shards.switched, (*AFTERWARDS, *RESCALING)),
}


def run_cases(engine: str, folder: Path) -> None:
    """In each of the processes, which are a group already."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    run, cases = ENGINES[engine]
    for case in cases:
        try:
            results[case] = run(case, folder / case)
        except Exception:
            traceback.print_exc()
            results[case] = traceback.format_exc()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, results)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(every))


def start_ray(folder: Path) -> None:
    """Ray starts the processes itself."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(num_cpus=2)
    TorchTrainer(
        lambda: run_cases("ray", folder),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(folder), name="run"),
    ).fit()
    ray.shutdown()


def main(engine: str, folder: Path) -> None:
    if engine == "ray":
        start_ray(folder)
        return
    dist.init_process_group("gloo")
    run_cases(engine, folder)
    gc.collect()  # what holds on to gloo, which aborts or hangs at times if it goes first
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
