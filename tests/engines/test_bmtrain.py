"""BMTrain and ModelCenter: the same numbers as torch alone, on one process and on two.

Backbones: BERT and LLaMA, wrapped by BMTrain, and ModelCenter's BERT, all tiny. BMTrain's own code
runs, on the CPU (`bmt_on_cpu`), in processes of its own (`bmt_job`).
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engines

HERE = Path(__file__).parent
PATHS = [HERE.parents[1], HERE.parent / "golden", HERE]
JOB = HERE / "bmt_job.py"
METHODS = (
    "LoraModel",
    "LoraModel with a norm",
    "AdapterModel",
    "LowRankAdapterModel",
    "CompacterModel",
    "ParallelAdapterModel",
    "BitFitModel",
    "SoftPromptModel",
)
BACKBONES = ("bert", "llama", "modelcenter")
WORLDS = (1, 2)


def start(script: list[str], world: int, folder: Path | None = None) -> str:
    """Run a Python script in `world` processes; returns what the first of them said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    started = []
    for rank in range(world):
        env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when it is read
        command: dict[str, Any] = {"args": [sys.executable, *script], "cwd": folder, "env": env}
        started.append((subprocess.Popen(**command, stdout=said, stderr=said), said))
    try:
        codes = [process.wait(timeout=300) for process, _ in started]
    finally:
        for process, _ in started:
            process.kill()
    spoken = []
    for code, (_, said) in zip(codes, started, strict=True):
        with said:
            said.seek(0)
            spoken.append(said.read())
        assert code == 0, spoken[-1][-4000:]
    return spoken[0]


@functools.cache
def results(backbone: str) -> dict[str, Any]:
    """What the runs said: of ``"1"`` and ``"2"`` processes of BMTrain, and of ``"plain"`` torch."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for run, world in (("1", 1), ("2", 2), ("plain", 1)):
            place = Path(folder) / run
            place.mkdir()
            start([str(JOB), backbone, str(place), *["plain"] * (run == "plain")], world)
            found[run] = torch.load(place / "result.pt")
    return found


def of(backbone: str, method: str, world: int) -> tuple[dict[str, Any], dict[str, Any]]:
    found = results(backbone)
    return found["plain"][method], found[str(world)][method]


everywhere = pytest.mark.parametrize("world", WORLDS)
each_method = pytest.mark.parametrize("method", METHODS)
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)


@each_backbone
@each_method
@everywhere
def test_trains_as_torch_alone(backbone: str, method: str, world: int) -> None:
    plain, engine = of(backbone, method, world)
    assert engine["places"] == plain["places"]
    assert engine["values"] == plain["values"] > 0
    assert engine["losses"] == pytest.approx(plain["losses"], abs=2e-6)
    assert plain["losses"][-1] < plain["losses"][0]
    torch.testing.assert_close(engine["output"], plain["output"], atol=1e-5, rtol=0)


@each_backbone
@each_method
@everywhere
def test_saved_and_loaded_on_bmtrain_and_on_torch(backbone: str, method: str, world: int) -> None:
    plain, engine = of(backbone, method, world)
    assert not torch.allclose(engine["output"], engine["bare"], atol=1e-3)
    torch.testing.assert_close(engine["loaded"], engine["output"], atol=1e-6, rtol=0)
    torch.testing.assert_close(plain[f"loaded {world}"], engine["output"], atol=1e-6, rtol=0)
    if world == 1:
        torch.testing.assert_close(engine["loaded by BMTrain"], engine["output"], atol=1e-6, rtol=0)


@each_backbone
@each_method
@everywhere
def test_detached_the_backbone_is_bare(backbone: str, method: str, world: int) -> None:
    _, engine = of(backbone, method, world)
    torch.testing.assert_close(engine["detached"], engine["bare"], atol=0, rtol=0)


@pytest.mark.parametrize("backbone", ["bert", "llama"])  # ModelCenter has a list of its own
@everywhere
def test_the_hash_is_that_of_the_plain_backbone(backbone: str, world: int) -> None:
    plain, engine = of(backbone, "LoraModel", world)
    assert engine["hash"] == plain["hash"]


@everywhere
def test_before_and_around_the_wrapping(world: int, tmp_path: Path) -> None:
    start([str(HERE / "bmt_orders.py")], world, tmp_path)


@pytest.mark.parametrize("delta", ["lora", "adapter", "bitfit"])
def test_the_example_learns_and_saves(delta: str, tmp_path: Path) -> None:
    example = HERE.parents[1] / "examples" / "tutorial" / "2_with_bmtrain.py"
    folder = tmp_path / "delta"
    said = start(
        [str(HERE / "bmt_example.py"), str(example), "--delta", delta, "--save", str(folder)], 2
    )
    losses = [float(line.rsplit(" ", 1)[1]) for line in said.splitlines() if "loss" in line]
    assert losses[-1] < losses[0]
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


@everywhere
def test_the_code_of_the_page_runs(world: int, tmp_path: Path) -> None:
    page = HERE.parents[1] / "docs" / "bmtrain.md"
    start([str(HERE / "bmt_page.py"), str(page)], world, tmp_path)
    assert {file.name for file in (tmp_path / "my_delta").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
