"""Deltas on the engines: two processes compute what one does, and save what it would save.

Each engine runs once, all cases in one pair of processes (`worker.py`); the tests look at what they
left behind. The answer to compare with is one plain process.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import backbones
import psutil
import pytest
import splitting
import torch
import training
import worker
from safetensors.torch import load_file
from torch import Tensor, nn

import opendelta

pytestmark = pytest.mark.engines

TRAINING = ("ddp", "fsdp2", "fsdp2_afterwards", "fsdp2_late", "fsdp2_detached")
TRAINING += ("accelerate", "trainer", "ray")
DEEPSPEED = ("zero2", "zero3", "zero3_early")
CASES = [(engine, case) for engine in (*TRAINING, *DEEPSPEED) for case in worker.ENGINES[engine][1]]
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "distributed"
ON_PATH = [str(ROOT), str(ROOT / "tests" / "golden")]
SECONDS = 240  # DeepSpeed compiles an extension at its first run


def in_two_processes(script: Path, folder: Path, *arguments: str) -> str:
    """What a script prints that `torchrun` runs in a folder."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return said_by([*launch, str(script), *arguments], folder)


def on_ray(script: Path, folder: Path, *arguments: str) -> str:
    """What a script prints that has Ray start its processes, none of which it leaves behind."""
    with tempfile.TemporaryDirectory(prefix="ray") as place:  # short: it holds sockets
        own = {"RAY_TMPDIR": place, "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        said = said_by([str(script), *arguments], folder, RAY_USAGE_STATS_ENABLED="0", **own)
        left = [p for p in psutil.process_iter(["environ"]) if place in str(p.info["environ"])]
        _, alive = psutil.wait_procs(left, timeout=10)
        assert not alive
    return said


def said_by(command: list[str], folder: Path, **more: str) -> str:
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(ON_PATH)}
    started = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | environment | more,
    )
    try:
        said, complained = started.communicate(timeout=SECONDS)
    finally:
        started.terminate()  # in vain if it is done; else torchrun ends its processes too
    assert started.returncode == 0, complained[-8000:]
    return said


class Outcome:
    """What two processes left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first, second = json.loads((folder / "results.json").read_text())
        assert first.keys() == second.keys()
        self.by_rank = [first, second]

    def of(self, case: str) -> Any:
        """What a case returned, the same on both ranks."""
        first, second = (results[case] for results in self.by_rank)
        assert first == second, f"the ranks differ:\n{first}\n{second}"
        assert not str(first).startswith("Traceback"), first
        return first


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Engine -> what it left behind; each runs when first asked for."""

    @functools.cache
    def run(engine: str) -> Outcome:
        folder = tmp_path_factory.mktemp(engine)
        launch = on_ray if engine == "ray" else in_two_processes
        launch(Path(worker.__file__), folder, engine, str(folder))
        return Outcome(folder)

    return run


@functools.cache
def plain(case: str) -> tuple[list[float], nn.Module, dict[str, Tensor]]:
    """Losses, trained model and saved tensors of one process."""
    model = backbones.build("bert_cls").train()
    delta = training.put(case, model)
    losses = training.train(training.steps_of(model), lambda batch: batch)
    return losses, model, saved_by(delta)


def saved_by(delta: opendelta.DeltaBase) -> dict[str, Tensor]:
    """The tensors in the file that a delta writes."""
    with tempfile.TemporaryDirectory() as folder:
        delta.save_finetuned(folder)
        return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize(("engine", "case"), CASES)
def test_training_equals_one_process(outcome: Any, engine: str, case: str) -> None:
    losses, _, _ = plain(case)
    assert max(losses) - min(losses) > 0.1  # each step counts
    assert outcome(engine).of(case)["losses"] == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize(("engine", "case"), CASES)
def test_going_on_from_what_was_saved(outcome: Any, engine: str, case: str) -> None:
    losses, _, _ = plain(case)
    assert outcome(engine).of(case)["resumed"] == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize(("engine", "case"), [pair for pair in CASES if pair[0] != "trainer"])
def test_loading_on_the_engine_and_going_on(outcome: Any, engine: str, case: str) -> None:
    model = backbones.build("bert_cls").train()
    training.put(case, model)
    for part in (slice(training.HALF), slice(training.HALF, None)):  # each with a new optimizer
        losses = training.train(training.steps_of(model), lambda batch: batch, part)
    assert outcome(engine).of(case)["loaded"] == pytest.approx(losses, abs=1e-6)
    assert outcome(engine).of(case)["resumed"][-2:] != pytest.approx(losses[-2:], abs=1e-3)


@pytest.mark.parametrize(("engine", "case"), CASES)
def test_the_file_is_that_of_one_process(outcome: Any, engine: str, case: str) -> None:
    _, _, expected = plain(case)
    folder = outcome(engine).folder / case
    written = {file.name for file in folder.iterdir()} - {"run"}
    assert written == {"config.json", "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone_class"] == "BertForSequenceClassification"
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == expected[name].dtype
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("engine", "case"), CASES)
def test_a_fresh_backbone_loads_it(outcome: Any, engine: str, case: str) -> None:
    _, trained, _ = plain(case)
    model = backbones.build("bert_cls")
    opendelta.AutoDeltaModel.from_finetuned(outcome(engine).folder / case, model)
    batch = training.batches()[0]
    with torch.no_grad():
        actual, expected = model(**batch).logits, trained.eval()(**batch).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


# --- tensor parallelism ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", splitting.PLANS)
def test_split_lora_equals_one_process(outcome: Any, case: str) -> None:
    model = splitting.decoder(case).train()
    delta = splitting.put_on(case)(model)
    losses = training.train(training.steps_of(model), splitting.causal)
    assert max(losses) - min(losses) > 0.02
    split = outcome("tensor_parallel").of(case)
    assert split["losses"] == pytest.approx(losses, abs=2e-6)
    assert split["resumed"] == pytest.approx(losses, abs=2e-6)
    folder = outcome("tensor_parallel").folder / case
    saved = load_file(folder / "model.safetensors")
    expected = saved_by(delta)
    assert saved.keys() == expected.keys()
    moved = 0.0
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=0)
        moved += float(tensor.abs().sum()) if name.endswith("lora_B") else 0.0
    assert moved > 1e-3  # they start at zero

    fresh = splitting.decoder(case)
    opendelta.AutoDeltaModel.from_finetuned(folder, fresh)
    torch.testing.assert_close(decoded(fresh), decoded(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", splitting.PLANS)
def test_a_split_backbone_loads_the_file_of_a_whole_one(outcome: Any, case: str) -> None:
    loaded = torch.tensor(outcome("split_loads").of(case))
    model = splitting.decoder(case)
    bare = decoded(model)
    opendelta.AutoDeltaModel.from_finetuned(outcome("split_loads").folder / case / "delta", model)
    assert (decoded(model) - bare).abs().max() > 0.1
    torch.testing.assert_close(loaded, decoded(model), atol=1e-5, rtol=0)


@torch.no_grad()
def decoded(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(training.batches()[0]["input_ids"]).logits
    return logits


def test_a_delta_beside_split_modules_is_the_same_on_all_ranks(outcome: Any) -> None:
    model = splitting.decoder("llama").train()
    torch.manual_seed(1)
    delta = opendelta.AdapterModel(model, 4, modified_modules=["input_layernorm"])
    delta.freeze_module()
    losses = training.train(training.steps_of(model), splitting.causal)
    assert max(losses) - min(losses) > 0.02
    assert outcome("beside_a_split").of("Adapter")["losses"] == pytest.approx(losses, abs=2e-6)


@pytest.mark.parametrize("case", worker.ENGINES["refused_on_split"][1])
def test_other_methods_name_the_plan(outcome: Any, case: str) -> None:
    said = outcome("refused_on_split").of(case)
    split = "model.embed_tokens'" if case == "SoftPrompt" else "model.layers.0."
    assert said.startswith(f"InsertionError: '{split}")
    assert "Shard(dim=" in said and "tp_plan" in said


# --- what is refused on every rank -------------------------------------------------------------


@pytest.mark.parametrize("case", worker.ENGINES["put_after_ddp"][1])
def test_a_delta_after_ddp_names_the_order(outcome: Any, case: str) -> None:
    for said in outcome("put_after_ddp").of(case):
        assert said.startswith("InsertionError") and "DistributedDataParallel" in said
        assert "Construct (or attach) the delta first" in said


@pytest.mark.parametrize(
    ("case", "word"), [("new", "ZeRO-3"), ("detached", "ZeRO-3"), ("engine", "DeepSpeedEngine")]
)
def test_a_delta_after_deepspeed_names_the_order(outcome: Any, case: str, word: str) -> None:
    said = outcome("put_after_zero").of(case)
    assert said.startswith("InsertionError") and word in said
    assert "Construct (or attach) the delta first" in said


@pytest.mark.parametrize("case", worker.ENGINES["put_after_zero2"][1])
def test_a_delta_after_zero2_is_warned_of(outcome: Any, case: str) -> None:
    (said,) = outcome("put_after_zero2").of(case)
    assert "will not train" in said and "Construct (or attach) the delta first" in said


@pytest.mark.parametrize("case", ["flat", "originals"])
def test_what_fsdp1_flattened_takes_and_saves_no_delta(outcome: Any, case: str) -> None:
    for said in outcome("refused_on_fsdp1").of(case):
        assert said.startswith("InsertionError") and "fully_shard" in said


@pytest.mark.parametrize("case", worker.REFUSED_BY_FSDP2)
def test_what_fsdp2_cannot_add_names_the_order(outcome: Any, case: str) -> None:
    said = outcome("refused_on_fsdp2").of(case)
    assert said.startswith("InsertionError") and "FSDP2" in said and "first, then let" in said


def test_a_network_sharded_with_one_prefix_says_what_to_do(outcome: Any) -> None:
    said = outcome("fsdp2_network").of("before")
    assert said.startswith("InsertionError") and "on after fully_shard" in said


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("methods", ("BitFitModel", "LoraModel")),
        ("arguments", ("'lora_r': 4", "'lora_r': 5")),
        ("shapes", ("1.attention.self.value.lora.lora_A", "(4, 32)", "(4, 64)")),
    ],
)
def test_ranks_that_construct_different_deltas_are_told(
    outcome: Any, case: str, words: tuple[str, ...]
) -> None:
    said = outcome("ranks_that_differ").of(case)
    assert said.startswith("InsertionError") and all(word in said for word in words)


def test_ranks_are_told_that_another_failed(outcome: Any) -> None:
    good, bad = (results["failures"] for results in outcome("ranks_that_differ").by_rank)
    assert bad.startswith("AddressingError") and "1.attention.self.value" in bad
    assert good.startswith("InsertionError") and "AddressingError" in good


@pytest.mark.parametrize("case", ["fsdp2", "zero3"])
def test_all_ranks_learn_that_the_first_could_not_write(outcome: Any, case: str) -> None:
    first, second = (results[case] for results in outcome("unwritable").by_rank)
    assert first == "OSError: disk full"
    assert second.startswith("CheckpointError") and "disk full" in second


def test_all_ranks_learn_that_the_first_may_not_write(outcome: Any) -> None:
    first, second = (results["a foreign folder"] for results in outcome("unwritable").by_rank)
    assert first.startswith("CheckpointError") and "overwrite=True" in first
    assert second.startswith("CheckpointError") and "overwrite=True" in second


@pytest.mark.parametrize("case", ["stale", "into a delta"])
def test_ranks_that_read_different_files_are_told(outcome: Any, case: str) -> None:
    said = outcome("loads_that_differ").of(case)
    assert said.startswith("CheckpointError") and said.count("query.lora.lora_A (4, 64)") > 1


@pytest.mark.parametrize(("case", "word"), [("missing", "1'"), ("damaged", "sha256")])
def test_ranks_are_told_that_another_could_not_read(outcome: Any, case: str, word: str) -> None:
    for said in (results[case] for results in outcome("loads_that_differ").by_rank):
        assert said.startswith("CheckpointError") and word in said


# --- on all ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", worker.ENGINES["hashes"][1])
def test_a_sharded_backbone_hashes_like_a_whole_one(outcome: Any, case: str) -> None:
    whole = backbones.build("llama" if case == "split" else "bert_cls")
    hashes = [opendelta.gen_model_hash(whole, format=number) for number in (1, 2)]
    assert outcome("hashes").of(case) == hashes


@pytest.mark.parametrize("stage", worker.ENGINES["zero_switched"][1])
def test_switching_on_deepspeed(outcome: Any, stage: str) -> None:
    for logits in outcome("zero_switched").of(stage).values():
        on, off, again = map(torch.tensor, logits)
        assert (on - off).abs().max() > 1e-3
        torch.testing.assert_close(again, on, atol=1e-6, rtol=0)


def test_one_rank_writes_what_is_on_two_meshes(outcome: Any) -> None:
    assert outcome("two_meshes").of("LoRA") == [0]


@pytest.mark.parametrize("what", worker.ENGINES["after_a_forward"][1])
def test_shards_are_used_after_a_forward_left_whole_tensors(outcome: Any, what: str) -> None:
    assert outcome("after_a_forward").of(what) is True


@pytest.mark.parametrize("case", worker.ENGINES["switched"][1])
def test_switching_and_loading_on_shards(outcome: Any, case: str) -> None:
    on, again, loaded, off, after, removed = map(torch.tensor, outcome("switched").of(case))
    assert (on - off).abs().max() > 1e-3
    for same in (again, loaded):
        torch.testing.assert_close(same, on, atol=1e-5, rtol=0)
    for same in (after, removed):
        assert torch.equal(same, off)


@pytest.mark.parametrize("engine", worker.ENGINES["moved_buffers"][1])
def test_statistics_come_and_go_with_the_delta(outcome: Any, engine: str) -> None:
    found = outcome("moved_buffers").of(engine)
    assert found.pop("the file") < 1e-6
    assert all(found.values()), found


def test_a_layer_of_a_users_own_joins_fsdp2(outcome: Any) -> None:
    both = [outcome("fsdp2_own_layer").of(when) for when in ("before", "afterwards")]
    assert both[0] == pytest.approx(both[1], abs=1e-6)


@pytest.mark.parametrize("case", ["LoRA", "Adapter"])
def test_a_delta_that_comes_late_has_the_precision_of_its_layer(outcome: Any, case: str) -> None:
    assert outcome("fsdp2_precision").of(case) == ["torch.bfloat16"]


SCRIPTS = [path for path in sorted(EXAMPLES.glob("*.py")) if path.name != "tiny.py"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_examples_learn_and_save(script: Path, tmp_path: Path) -> None:
    said = (on_ray if script.stem == "ray_" else in_two_processes)(script, tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss'?:? '?(\d+\.\d+)", said)]
    assert len(losses) >= 4 and losses[-1] < losses[0]
    saved = list(tmp_path.glob("delta_checkpoints/delta_*/**/model.safetensors"))
    assert saved and all(load_file(file) for file in saved)
