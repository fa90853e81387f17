"""The command `opendelta`: each command, what it prints, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import backbones
import peft
import pytest
import torch
from cases import randomise
from center_deltas import NAME, content, saved
from hub_client import hurry, set_apart
from hub_server import serving
from huggingface_hub import constants
from placed import PLACED_METHODS, place
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

import opendelta
from opendelta import AutoDeltaConfig, AutoDeltaModel, DeltaBase, DeltaCenter, LoraModel
from opendelta.cli import main

ROOT = Path(__file__).parent.parent
OLD = ROOT / "tests" / "golden" / "checkpoints"  # written by OpenDelta 0.3.2
COMMANDS = ("info", "push", "pull", "list", "convert", "tree", "select")
FOR_A_PROCESS = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
Run = Callable[..., str]
Fail = Callable[..., str]


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DELTACENTER_URL", (tmp_path / "share").as_uri())
    monkeypatch.delenv("DELTACENTER_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # as main does: backbones are saved here too
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a line that goes well and says nothing on standard error; what it printed."""

    def function(line: str) -> str:
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return function


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Fail:
    """Run a line that fails, prints nothing, and tells why in one line; that line."""

    def function(line: str) -> str:
        assert main(shlex.split(line)) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("opendelta: error: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        return err

    return function


@pytest.fixture
def bert(tmp_path: Path) -> PreTrainedModel:
    """A backbone, which is saved in `bert` too."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    return model


def with_lora(model: PreTrainedModel, folder: str = "lora") -> DeltaBase:
    delta = LoraModel(model, modified_modules=["query", "value"], lora_r=4)
    delta.freeze_module(exclude=["deltas", "classifier"])
    randomise(delta)
    delta.save_finetuned(folder)
    return delta


def row(table: str, title: str) -> str:
    found = re.search(rf"^{re.escape(title)}  +(.*)$", table, re.MULTILINE)
    assert found, f"no {title} in {table}"
    return found[1]


IDS = torch.tensor([[5, 9, 3, 2]])


# --- info -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PLACED_METHODS)
def test_info_counts_what_a_delta_holds(method: str, run: Run) -> None:
    delta = place(method, "bert_cls")
    delta.freeze_module(exclude=["deltas", "classifier"])
    delta.save_finetuned("d")
    tensors = load_file("d/model.safetensors")
    count = sum(tensor.numel() for tensor in tensors.values())
    own = sum(t.numel() for n, t in tensors.items() if n in delta.config.backbone_hash_excludes)
    table = run("info d")
    assert row(table, "method") == delta.delta_type
    assert row(table, "modified modules") == ", ".join(delta.config.modified_modules)
    assert row(table, "backbone").startswith(type(delta.backbone_model).__name__)
    assert row(table, "backbone's hash") == delta.config.backbone_hash
    assert row(table, "sha256") == f"{delta.config.weights_sha256}: checked"
    expected = f"{count:,} in {len(tensors)} tensors, {own:,} of them the backbone's own"
    assert row(table, "parameters") == expected
    size = Path("d/model.safetensors").stat().st_size
    assert f"model.safetensors ({size:,} bytes)" in row(table, "files")


def test_a_checkpoint_of_a_trainer_is_known_by_the_delta_in_it(run: Run) -> None:
    delta = place("LoraModel", "bert_cls", lora_r=3)
    delta.freeze_module()
    delta.save_finetuned("out/checkpoint-4/delta")
    delta.backbone_model.config.save_pretrained("out/checkpoint-4")
    Path("out/checkpoint-4/model.safetensors").write_bytes(b"the Trainer's")
    table = run("info out/checkpoint-4")
    assert "lora_r=3" in row(table, "settings")
    assert row(table, "sha256") == f"{delta.config.weights_sha256}: checked"
    run("convert out/checkpoint-4 other --to bin")
    converted = torch.load("other/pytorch_model.bin")
    assert {*converted} == {name for name, _ in delta.named_parameters()}


def test_info_of_a_name_downloads_no_weights(run: Run, tmp_path: Path) -> None:
    delta = place("LoraModel", "mlp", lora_r=3)
    delta.freeze_module()
    delta.save_finetuned(
        "d", push_to_dc=True, center_args={"name": NAME}, list_tags=["demo"], usage="Tabbed\there."
    )
    table = run(f"info {NAME}")
    info = DeltaCenter.from_url().info(NAME)
    assert row(table, "revision") == info.revision
    assert row(table, "center") == (tmp_path / "share").as_uri()
    assert "lora_r=3" in row(table, "settings") and row(table, "tags") == "demo"
    assert row(table, "sha256").endswith("checked when it is pulled")
    assert "parameters  " not in table and not (tmp_path / "cache").exists()
    assert table.endswith(info.card.expandtabs())
    assert json.loads(run(f"info {NAME} --json")) == {
        "name": NAME, "revision": info.revision, "url": info.url, "config": info.config,
        "sizes": info.sizes, "card": info.card, "weights": None,
    }  # fmt: skip


def test_info_of_one_revision(run: Run, fail: Fail) -> None:
    for seed in range(2):
        saved(Path(f"d{seed}"), seed)
    first = run(f"push d0 {NAME}").strip()
    run(f"push d1 {NAME} --revision next/one")
    assert row(run(f"info {NAME} --revision {first}"), "revision") == first
    assert row(run(f"info {NAME} --revision next/one"), "revision") != first
    assert "v9" in fail(f"info {NAME} --revision v9")


def test_info_as_json(run: Run) -> None:
    delta = saved(Path("d"))
    found = json.loads(run("info d --json"))
    assert found["config"] == json.loads(Path("d/config.json").read_text())
    assert found["weights"] == {
        "file": "model.safetensors",
        "tensors": len(list(delta.parameters())),
        "parameters": sum(p.numel() for p in delta.parameters()),
        "of_the_backbone": 0,
    }


@pytest.mark.parametrize("folder", sorted(OLD.iterdir()), ids=lambda folder: folder.name)
def test_info_of_what_0_3_2_saved(folder: Path, run: Run) -> None:
    table = run(f"info {folder}")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    count = sum(tensor.numel() for tensor in tensors.values())
    assert row(table, "parameters") == f"{count:,} in {len(tensors)} tensors"
    assert "sha256" not in table


def test_what_could_play_with_a_terminal_is_not_printed(run: Run, fail: Fail) -> None:
    saved(Path("d"))
    config = json.loads(Path("d/config.json").read_text())
    config |= {"backbone_class": "Bert\x1b]0;owned\x07", "list_tags": ["a\u202eb\nmethod  forged"]}
    Path("d/config.json").write_text(json.dumps(config))
    Path("d/README.md").write_text("# card\x1b[2J\n[bold]not markup[/bold]\n", encoding="utf-8")
    table = run("info d")
    assert not set(table) & set("\x1b\x07\u202e")
    assert row(table, "backbone") == "Bert\ufffd]0;owned\ufffd"
    assert row(table, "method") == "lora" and row(table, "tags") == "a\ufffdb\ufffdmethod  forged"
    assert "[bold]not markup[/bold]" in table
    assert json.loads(run("info d --json"))["config"]["backbone_class"] == config["backbone_class"]
    assert "\x1b" not in fail("info 'nowhere\x1b[2J'")


# --- centers --------------------------------------------------------------------------------------


def test_push_list_and_pull(run: Run, tmp_path: Path) -> None:
    delta = saved(Path("d"))
    revision = run(f"push d {NAME} --message 'the first'").strip()
    assert revision == DeltaCenter.from_url().info(NAME).revision
    run("push d team")
    assert run("list nothing") == "" and run("list nothing --json") == "[]\n"
    assert run("list") == f"{NAME}\nteam\n" and run("list sent") == f"{NAME}\n"
    assert json.loads(run("list --json")) == [NAME, "team"]
    (row_,) = json.loads(run("list sent --long --json"))
    size = sum(path.stat().st_size for path in Path("d").iterdir())
    assert row_ == {
        "name": NAME, "method": "lora", "backbone": type(delta.backbone_model).__name__,
        "bytes": size, "revision": revision,
    }  # fmt: skip
    table = run("list --long")
    assert all(word in table for word in (NAME, "team", "lora", f"{size:,}", revision[:12]))

    cached = Path(run(f"pull {NAME}").strip())
    assert tmp_path / "cache" in cached.parents and content(cached) == content(Path("d"))
    assert run(f"pull {NAME} 'my copy'") == "my copy\n"
    assert content(Path("my copy")) == content(Path("d"))


def test_another_center_and_revision(run: Run, fail: Fail, tmp_path: Path) -> None:
    for seed in range(2):
        saved(Path(f"d{seed}"), seed)
    other = (tmp_path / "other").as_uri()
    first = run(f"push d0 {NAME} --center {other}").strip()
    run(f"push d1 {NAME} --center {other}")
    assert "share" in fail(f"pull {NAME}")  # it is not on the one of the environment
    run(f"pull {NAME} old --center {other} --revision {first}")
    run(f"pull {NAME} new --center {other} --force")
    assert content(Path("old")) == content(Path("d0"))
    assert content(Path("new")) == content(Path("d1"))
    assert run(f"list --center {other}") == f"{NAME}\n"
    assert "no such" not in run(f"info {NAME} --center {other}")


def test_the_hub(run: Run, fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_apart(monkeypatch, tmp_path, xet=True)
    hurry(monkeypatch)
    delta = place("LoraModel", "mlp", lora_r=3)
    delta.freeze_module()
    with serving(tmp_path / "hub") as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        name = {"name": NAME}
        delta.save_finetuned("d", push_to_dc=True, center_args=name, delay_push=True)
        revision = run("push d sentiment --private").strip()
        assert run("list") == f"{NAME}\n" and revision[:12] in run("list --long")
        assert row(run(f"info {NAME}"), "revision") == revision
        run(f"pull {NAME} copy")
        assert content(Path("copy")) == content(Path("d"))
        Path("d/README.md").write_text("another card")
        monkeypatch.setenv("HF_TOKEN", "hf_reader")
        assert "(403)" in fail(f"push d {NAME}")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert "(401)" in fail(f"info {NAME}") and "(401)" in fail("push d sentiment")
        server.failing = [("", 503)]
        assert "(503)" in fail("list")


def test_the_cache_is_used_offline(run: Run, monkeypatch: pytest.MonkeyPatch, fail: Fail) -> None:
    saved(Path("d"))
    run(f"push d {NAME}")
    first = run(f"pull {NAME}")
    monkeypatch.setenv("DELTACENTER_OFFLINE", "1")
    assert run(f"pull {NAME}") == first
    for line in ("list", f"push d {NAME}", f"info {NAME}", "pull never/pulled"):
        assert "offline" in fail(line)


def test_nothing_is_overwritten(run: Run, fail: Fail, bert: PreTrainedModel) -> None:
    with_lora(bert)
    run(f"push lora {NAME}")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    before = content(Path("lora"))
    for line in (f"pull {NAME} mine", "convert lora mine --to bin", "convert lora lora --to bin",
                 "convert lora mine --to peft --model bert", f"pull {NAME} mine/thesis.txt",
                 "convert lora/model.safetensors mine/thesis.txt"):  # fmt: skip
        assert "exists already" in fail(line)
    assert content(Path("mine")) == {"thesis.txt": b"years of work"}
    assert content(Path("lora")) == before


# --- convert --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PLACED_METHODS)
def test_to_torch_and_back(method: str, run: Run) -> None:
    delta = place(method, "bert_cls")
    delta.freeze_module(exclude=["deltas", "classifier"])
    randomise(delta)
    delta.save_finetuned("d")
    assert run("convert d bin --to bin") == "bin\n"
    assert set(content(Path("bin"))) == {"config.json", "pytorch_model.bin"}
    run("convert bin back")
    before, after = load_file("d/model.safetensors"), load_file("back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert AutoDeltaConfig.from_finetuned("back") == AutoDeltaConfig.from_finetuned("d")
    expected = backbones.run(delta.backbone_model.eval(), "bert_cls")
    for folder in ("bin", "back"):
        again = backbones.build("bert_cls")
        AutoDeltaModel.from_finetuned(folder, again)  # which checks the sha256
        assert torch.equal(backbones.run(again, "bert_cls"), expected)


@pytest.mark.parametrize("folder", sorted(OLD.iterdir()), ids=lambda folder: folder.name)
def test_what_0_3_2_saved_becomes_safetensors(folder: Path, run: Run) -> None:
    run(f"convert {folder} new")
    old = torch.load(folder / "pytorch_model.bin", weights_only=True)
    new = load_file("new/model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    backbone = folder.name.split("-")[1]
    outputs = []
    for source in (folder, Path("new")):
        model = backbones.build(backbone)
        AutoDeltaModel.from_finetuned(source, model, check_hash=False)
        outputs.append(backbones.run(model, backbone))
    assert torch.equal(*outputs)


def test_files_of_tensors(run: Run, fail: Fail) -> None:
    shared = torch.arange(6.0).view(2, 3)
    torch.save({"a": shared, "b": shared, "c": shared.t()}, "a.bin")
    run("convert a.bin b.safetensors")
    run("convert b.safetensors c.pt")
    for tensors in (load_file("b.safetensors"), torch.load("c.pt", weights_only=True)):
        assert tensors.keys() == {"a", "b", "c"} and torch.equal(tensors["c"], shared.t())
    for line in ("convert a.bin d.txt", "convert a.bin d.pt --to bin"):
        assert "suffix" in fail(line)


def test_a_lora_goes_to_peft_and_comes_back(run: Run, bert: PreTrainedModel) -> None:
    with_lora(bert)
    expected = bert(IDS).logits

    def fresh() -> PreTrainedModel:
        return BertForSequenceClassification.from_pretrained("bert").eval()

    run("convert lora adapter --to peft --model bert")
    theirs = peft.PeftModel.from_pretrained(fresh(), "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, expected)
    run("convert adapter back --model bert")
    run("convert adapter torch --model bert --to bin --class BertForSequenceClassification")
    assert set(content(Path("torch"))) == {"config.json", "pytorch_model.bin"}
    for folder in ("back", "torch"):
        model = fresh()
        AutoDeltaModel.from_finetuned(folder, model)
        torch.testing.assert_close(model(IDS).logits, expected)


def test_an_old_lora_goes_to_peft() -> None:
    backbones.build("t5").save_pretrained("t5")
    line = f"convert {OLD / 'lora-t5-default'} adapter --to peft --model t5"
    assert main(shlex.split(line)) == 0  # with a warning: 0.3.2's hash is of something else
    ours = backbones.build("t5")
    AutoDeltaModel.from_finetuned(OLD / "lora-t5-default", ours)
    theirs = peft.PeftModel.from_pretrained(backbones.build("t5"), "adapter").eval()
    torch.testing.assert_close(backbones.run(theirs, "t5"), backbones.run(ours, "t5"))


def test_the_wrong_backbone_is_warned_of(
    bert: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with_lora(bert)
    torch.manual_seed(1)
    BertForSequenceClassification(bert.config).save_pretrained("other")
    assert main(["convert", "lora", "adapter", "--to", "peft", "--model", "other"]) == 0
    out, err = capsys.readouterr()
    assert out == "adapter\n" and err.count("\n") == 1
    assert err.startswith("opendelta: warning: This delta was trained on another backbone")


# --- backbones ------------------------------------------------------------------------------------


def test_tree_needs_no_weights(run: Run, bert: PreTrainedModel) -> None:
    Path("bert/model.safetensors").unlink()
    plain = opendelta.Visualization(bert).structure_graph(printTree=False)
    common = opendelta.Visualization(bert).structure_graph(common_structure=True, printTree=False)

    def lines(text: object) -> list[str]:
        return [line.rstrip() for line in str(text).rstrip().splitlines()]

    assert lines(run("tree bert")) == lines(plain)
    assert lines(run("tree bert --common")) == lines(common)
    assert "position_embeddings" not in run("tree bert --only-common")
    assert "dropout (Dropout)" in run("tree bert --all") and "Dropout" not in run("tree bert")
    assert len(lines(run("tree bert --params"))) > len(lines(plain))
    assert "pooler" not in run("tree bert --class BertForMaskedLM")


def test_tree_takes_no_memory_for_weights(run: Run) -> None:
    """A model of some terabytes is drawn."""
    config = LlamaConfig(hidden_size=65536, intermediate_size=262144, num_hidden_layers=100,
                         architectures=["LlamaForCausalLM"])  # fmt: skip
    config.save_pretrained("llama")
    assert "q_proj (Linear) weight:[65536, 65536]" in run("tree llama")


def test_select_prints_the_modules(
    bert: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bert/model.safetensors").unlink()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["select", "bert", "--port", "0"])))
    thread.start()
    printed, deadline = "", time.monotonic() + 60
    while "/?token=" not in printed:
        assert thread.is_alive() and time.monotonic() < deadline, printed
        time.sleep(0.02)
        printed += capsys.readouterr().out
    link = next(line for line in printed.splitlines() if "/?token=" in line)
    chosen = ["bert.encoder.layer.0.attention.self.query", "classifier"]
    body = json.dumps({"names": chosen}).encode()
    request = Request(link.replace("/?", "/submit?"), body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=20) as answer:
        assert answer.status == 200
    thread.join(20)
    assert codes == [0]
    assert capsys.readouterr().out.endswith(f"modified_modules:\n[{', '.join(chosen)}]\n")


HOSTILE = """
from pathlib import Path
Path("ran").touch()
from transformers import BertConfig, BertForSequenceClassification as Mine
"""


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "line", ["tree bert", "select bert", "convert lora a --to peft --model bert"]
)
def test_code_in_a_folder_is_not_run(
    line: str, known: bool, bert: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, fail: Fail
) -> None:
    with_lora(bert)
    Path("bert/modeling_mine.py").write_text(HOSTILE)
    config = json.loads(Path("bert/config.json").read_text())
    names = {"AutoConfig": "BertConfig", "AutoModel": "Mine"}
    config["auto_map"] = {auto: f"modeling_mine.{name}" for auto, name in names.items()}
    config["architectures"] = ["Mine"]
    config["model_type"] = "bert" if known else "mine"
    Path("bert/config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask
    if known and "convert" in line:  # our config says the class, which is one of transformers'
        assert main(shlex.split(line)) == 0
    else:
        assert re.search("code .*not run", fail(line))
    assert not Path("ran").exists()


# --- bad input ------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if how == "flip" else file.read_bytes()[:-9] if how == "cut" else b"")


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize(
    "line",
    ["info d", f"push d {NAME}", "convert d e --to bin", "convert d e --to peft --model bert"],
)
def test_damaged_weights(how: str, line: str, bert: PreTrainedModel, fail: Fail) -> None:
    with_lora(bert, "d")
    if how == "gone":
        Path("d/model.safetensors").unlink()
    else:
        damage(Path("d"), how)
    message = fail(line)
    assert "model.safetensors" in message and (how == "gone" or "sha256" in message)
    assert not Path("e").exists() and not Path("share").exists()


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_damaged_on_the_center(how: str, run: Run, fail: Fail, tmp_path: Path) -> None:
    saved(Path("d"))
    revision = run(f"push d {NAME}").strip()
    damage(tmp_path / "share" / NAME.replace("/", "--") / "versions" / revision, how)
    assert "model.safetensors" in fail(f"pull {NAME} copy")
    assert not Path("copy").exists() and content(tmp_path / "cache") == {}


MISSING = {
    "info nowhere/at/all": "no folder 'nowhere/at/all'.*not the name of a delta",
    "info nowhere": "no folder 'nowhere'",
    f"push nowhere {NAME}": "no folder 'nowhere'",
    f"push . {NAME}": "config.json",
    f"pull {NAME}": "share",
    "list": "share",
    "convert nowhere e": "no folder 'nowhere'",
    "convert . e": "config.json",
    "convert . e --to peft --model bert": "config.json",
    "tree nowhere": "no nowhere/config.json.*hf download",
    "select nowhere": "no nowhere/config.json",
    "tree .": "config.json",
}


@pytest.mark.parametrize("line", MISSING)
def test_what_is_not_there(line: str, fail: Fail) -> None:
    assert re.search(MISSING[line], fail(line))


@pytest.mark.parametrize(
    "name",
    "../up|/etc/passwd|C:x|a/b/c|a//b|a/..|https:x|a/b?c|a\x00b|a b|.hidden||a\nb".split("|"),
)
def test_bad_names(name: str, fail: Fail) -> None:
    saved(Path("d"))
    quoted = shlex.quote(name)
    for line in (f"push d {quoted}", f"pull {quoted}", f"pull {quoted} copy"):
        assert "is not the name of a delta" in fail(line)
    for line in (f"pull {NAME} --revision", f"push d {NAME} --revision", f"info {NAME} --revision"):
        assert "not a revision" in fail(f"{line} {shlex.quote(f'../{name}')}")
    assert "URL of a center" in fail(f"list --center {shlex.quote(f'x{name}')}")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown method": ({"delta_type": "lara"}, "'lora'"),
    "a dotted class": ({"delta_type": "os.system"}, "os.system"),
    "a method that is no name": ({"delta_type": ["lora"]}, "expected a name"),
    "an unknown field": ({"lora_rr": 1}, "lora_r"),
    "weights elsewhere": ({"weights_file": "../../secret"}, "weights"),
    "weights that never end": ({"weights_file": "/dev/zero"}, "weights"),
    "a newer version": ({"opendelta_version": "99.0"}, "newer"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_of_something_else(case: str, fail: Fail) -> None:
    saved(Path("d"))
    config = json.loads(Path("d/config.json").read_text())
    Path("d/config.json").write_text(json.dumps({**config, **CONFIGS[case][0]}))
    for line in ("info d", "info d --json", "convert d e --to bin"):
        assert CONFIGS[case][1] in fail(line)
    assert not Path("e").exists()


ODD: dict[str, Any] = {
    "modified_modules": 5, "backbone_class": 5, "backbone_hash": [1], "opendelta_version": "",
    "backbone_hash_excludes": [[1]], "lora_r": None, "backbone_checkpoint_name": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize("field", ODD)
def test_odd_values_are_told_as_they_are(field: str, run: Run) -> None:
    saved(Path("d"))
    config = json.loads(Path("d/config.json").read_text())
    Path("d/config.json").write_text(json.dumps({**config, field: ODD[field]}))
    assert row(run("info d"), "method") == "lora"


@pytest.mark.parametrize("text", ["", "[]", "null", "5", "[" * 100_000, "{", '{"a": 1}'])
def test_configs_that_are_none(text: str, fail: Fail) -> None:
    Path("d").mkdir()
    Path("d/config.json").write_text(text)
    for line in ("info d", "convert d e", f"push d {NAME}", "tree d", "select d"):
        assert "config.json" in fail(line)


BACKBONES: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({"architectures": None}, "--class BertModel"),
    "an empty list": ({"architectures": []}, "--class"),
    "no such class": ({"architectures": ["BertForNothing"]}, "Did you mean 'BertFor"),
    "no model": ({"architectures": ["pipeline"]}, "not a model"),
    "no model's class": ({"architectures": ["BertConfig"]}, "not a model"),
    "a path to code": ({"architectures": ["os.system"]}, "not a model"),
    "no name": ({"architectures": [5]}, "not a model"),
    "another model": ({"architectures": ["T5ForConditionalGeneration"]}, "cannot be built"),
    "an unknown model": ({"model_type": "bart2"}, "bart2"),
    "widths that do not fit": ({"num_attention_heads": 7}, "cannot be built"),
    "no number": ({"hidden_size": "wide"}, "config.json"),
    "a delta": ({"delta_type": "lora"}, "config of a delta"),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_backbones_that_cannot_be_built(case: str, bert: PreTrainedModel, fail: Fail) -> None:
    config = json.loads(Path("bert/config.json").read_text())
    Path("bert/config.json").write_text(json.dumps({**config, **BACKBONES[case][0]}))
    assert BACKBONES[case][1] in fail("tree bert")
    assert BACKBONES[case][1] in fail("select bert")


def test_a_kernel_that_a_config_names_is_not_fetched(bert: PreTrainedModel, run: Run) -> None:
    config = json.loads(Path("bert/config.json").read_text())
    config["attn_implementation"] = "kernels-community/flash-attn"
    Path("bert/config.json").write_text(json.dumps(config))
    assert "query" in run("tree bert")


def test_what_convert_asks_for(bert: PreTrainedModel, run: Run, fail: Fail) -> None:
    with_lora(bert)
    saved(Path("adapter"), method="AdapterModel")
    run("convert lora peft --to peft --model bert")
    for line, wanted in {
        "convert lora e --to peft": "--model MODEL_DIR",
        "convert peft e": "--model MODEL_DIR",
        "convert peft e --to peft --model bert": "PEFT's already",
        "convert lora e": "model.safetensors already",
        "convert adapter e --to peft --model bert": "'adapter' delta, which PEFT has not",
        "convert peft e --model bert --class BertForMaskedLM": "classifier",
        "convert lora e --to peft --model nowhere": "nowhere/config.json",
    }.items():
        assert wanted in fail(line), line
    damage(Path("bert"), "cut")
    assert "cannot be loaded" in fail("convert peft e --model bert")
    Path("bert/model.safetensors").unlink()
    assert "cannot be loaded" in fail("convert lora e --to peft --model bert")
    assert not Path("e").exists()


def test_a_pickle_that_would_run_code(fail: Fail) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, ("ran",)

    saved(Path("d"))
    Path("d/model.safetensors").unlink()
    torch.save({"a": Evil()}, "d/pytorch_model.bin")
    config = json.loads(Path("d/config.json").read_text())
    del config["weights_file"], config["weights_sha256"]
    Path("d/config.json").write_text(json.dumps(config))
    for line in ("info d", "convert d e", "convert d/pytorch_model.bin e.safetensors"):
        assert "could run code" in fail(line)
    assert not Path("ran").exists() and not Path("e").exists()


def test_a_folder_that_cannot_be_written(bert: PreTrainedModel, fail: Fail) -> None:
    """Whatever the system says becomes one line too."""
    with_lora(bert)
    Path("file").touch()
    for line in ("convert lora file/e --to bin", "convert lora/model.safetensors file/e.bin"):
        assert "file" in fail(line)


@pytest.mark.parametrize(
    "line", ["", "pusch d a/b", "--verbose", "info", "push d", "list a b", "convert a", "tree",
             "tree m --common --all", "convert a b --to gguf", "select m --port web", "info d --js"]
)  # fmt: skip
def test_lines_that_are_not_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.startswith("usage: opendelta")
    if line.startswith("pusch"):
        assert all(command in err for command in COMMANDS)


def test_a_port_that_is_none(bert: PreTrainedModel, fail: Fail) -> None:
    assert "port=99999" in fail("select bert --port 99999")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_is_understood(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capsys.readouterr().out
    example = re.search(r"^example: opendelta (.*)$", text, re.MULTILINE)
    assert caught.value.code == 0 and example and example[1].startswith(command)
    from opendelta.cli import _parser

    assert callable(_parser().parse_args(shlex.split(example[1])).run)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and all(f"\n    {command} " in text for command in COMMANDS)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"opendelta {opendelta.__version__}\n"


ALONE = """
import sys, types
sys.modules["opendelta"] = package = types.ModuleType("opendelta")
package.__path__ = [sys.argv.pop(1)]  # the command alone, without what the package imports
from opendelta.cli import main
try:
    main(sys.argv[1:])
finally:
    assert sys.modules.keys().isdisjoint({"torch", "transformers", "huggingface_hub", "flask"})
"""


@pytest.mark.parametrize("line", ["--version", "--help", "convert --help"])
def test_help_loads_no_large_library(line: str) -> None:
    command = [sys.executable, "-c", ALONE, str(ROOT / "opendelta"), *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0 and done.stderr == "" and "opendelta" in done.stdout


# --- processes, pipes and terminals ---------------------------------------------------------------


def process(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of the shell, in which `opendelta` is this checkout's."""
    function = f'opendelta() {{ {shlex.quote(sys.executable)} -m opendelta "$@"; }}\n'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", function + line],
        capture_output=True, text=True, env={**os.environ, **FOR_A_PROCESS, **env},
    )  # fmt: skip


def test_as_a_process(bert: PreTrainedModel) -> None:
    with_lora(bert)
    done = process("opendelta info lora --json | python3 -m json.tool --compact")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["delta_type"] == "lora"
    done = process("opendelta info nowhere")
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("opendelta: error: There is no folder")


@pytest.mark.slow
def test_a_reader_that_goes_away(bert: PreTrainedModel) -> None:
    with_lora(bert)
    Path("lora/README.md").write_text("a line of the card\n" * 100_000)
    done = process("opendelta info lora | head -n 1")
    assert done.stdout.startswith("delta") and done.returncode == 1
    assert not re.search("Traceback|BrokenPipe|error:", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["info lora", "tree bert", "list --long"])
def test_a_pipe_without_unicode(line: str, bert: PreTrainedModel, run: Run) -> None:
    with_lora(bert)
    Path("lora/README.md").write_text("# Grüße 你好\n", encoding="utf-8")
    run(f"push lora {NAME}")
    done = process(f"opendelta {line}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and len(done.stdout.splitlines()) > 4


def in_a_terminal(line: str, **env: str) -> str:
    """What a command writes when standard output is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "opendelta", *shlex.split(line)]
    running = subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.DEVNULL,
        env={**os.environ, **FOR_A_PROCESS, "TERM": "xterm-256color", **env},
    )  # fmt: skip
    os.close(theirs)
    pieces = []
    with contextlib.suppress(OSError):  # Linux's way of saying that the other end is closed
        while piece := os.read(ours, 1 << 16):
            pieces.append(piece)
    os.close(ours)
    assert running.wait(60) == 0
    return b"".join(pieces).decode()


@pytest.mark.slow
def test_colours_are_for_terminals(bert: PreTrainedModel, run: Run) -> None:
    assert "\x1b[" in in_a_terminal("tree bert")
    assert "\x1b[3" not in in_a_terminal("tree bert", NO_COLOR="1")
    assert "\x1b" not in run("tree bert")


def test_the_command_is_installed() -> None:
    """What setup.py promises to installers leads to `main`."""
    from importlib.metadata import EntryPoint

    (spec,) = re.findall(r'"console_scripts": \["(\w+) = (.+)"\]', (ROOT / "setup.py").read_text())
    assert EntryPoint(*spec, "console_scripts").load() is main and spec[0] == "opendelta"


# --- the page -------------------------------------------------------------------------------------


def test_the_console_lines_of_the_page_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("DELTACENTER_URL")
    used: set[str] = set()
    text = (ROOT / "docs" / "command_line.md").read_text()
    for block in re.finditer(r"^```(python|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if block[1] == "python":
            exec(block[2], {"__name__": "__page__"})
            continue
        for line in block[2].splitlines():
            program, *arguments = shlex.split(os.path.expandvars(line))
            if program == "export":
                monkeypatch.setenv(*arguments[0].split("=", 1))
                continue
            assert program == "opendelta"
            used.add(arguments[0])
            assert run(shlex.join(arguments)).strip()
    assert used == set(COMMANDS) - {"select"}  # which waits for a click
