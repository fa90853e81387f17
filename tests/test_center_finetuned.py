"""`save_finetuned(push_to_dc=True)` and `from_finetuned("user/name")`, for deltas and configs."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import yaml
from cases import randomise
from center_deltas import NAME, content, saved
from placed import PLACED_METHODS, place, unchanged
from transformers import BertConfig, BertForSequenceClassification

import opendelta
from opendelta import (
    AutoDeltaConfig,
    AutoDeltaModel,
    BackboneMismatchWarning,
    DeltaCenter,
    LoraConfig,
    LoraModel,
)
from opendelta.exceptions import CenterError, CheckpointError, ConfigError, UnreachableError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DELTACENTER_OFFLINE", raising=False)
    monkeypatch.setenv("DELTACENTER_URL", (tmp_path / "share").as_uri())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def center(tmp_path: Path) -> DeltaCenter:
    return DeltaCenter.from_url()


def same(a: Any, b: Any) -> bool:
    one, other = a.checkpoint_tensors(), b.checkpoint_tensors()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metadata(folder: Path) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PLACED_METHODS)
def test_there_and_back(method: str, tmp_path: Path) -> None:
    delta = place(method, "bert_cls")
    randomise(delta)
    delta.freeze_module(exclude=["deltas", "classifier"])
    delta.save_finetuned("delta", push_to_dc=True, center_args={"name": NAME})
    backbone = backbones.build("bert_cls")
    again = AutoDeltaModel.from_finetuned(NAME, backbone_model=backbone)
    assert type(again) is type(delta) and same(again, delta)
    expected = backbones.run(delta.backbone_model.eval(), "bert_cls")
    assert torch.equal(backbones.run(backbone, "bert_cls"), expected)
    config = AutoDeltaConfig.from_finetuned(NAME)
    assert config == delta.config == type(config).from_finetuned(NAME)


def test_the_example_of_the_specification(center: DeltaCenter) -> None:
    """`save_finetuned("...", push_to_dc=True)` alone names it after what it is."""
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module()
    delta.save_finetuned("test_delta_model", push_to_dc=True)
    delta.save_finetuned(
        "other", push_to_dc=True,
        center_args={"backbone_model": "google-bert/bert-base", "train_tasks": ["sst2", "cola"]},
        center_args_pool={"train_datasets": "nyu-mll/glue", "lr": 1},
    )  # fmt: skip
    assert center.list() == ["BertForSequenceClassification_lora", "bert-base_lora_sst2-cola_glue"]
    for name in center.list():
        assert same(AutoDeltaModel.from_finetuned(name, backbones.build("bert_cls")), delta)


def test_a_delayed_push(center: DeltaCenter, tmp_path: Path) -> None:
    delta = place("LoraModel", "mlp")
    delta.freeze_module()
    delta.save_finetuned("d", push_to_dc=True, center_args={"name": NAME}, delay_push=True)
    assert set(content(tmp_path / "d")) == {"config.json", "model.safetensors", "README.md"}
    assert not (tmp_path / "share").exists()
    center.push("d", NAME)
    assert content(center.pull(NAME)) == content(tmp_path / "d")


def test_without_push_nothing_is_published(tmp_path: Path) -> None:
    delta = place("LoraModel", "mlp")
    delta.freeze_module()
    delta.save_finetuned("d", center_args={"name": NAME}, list_tags=["a"])
    assert set(content(tmp_path / "d")) == {"config.json", "model.safetensors"}
    assert AutoDeltaConfig.from_finetuned("d").list_tags == ["a"]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "a path": ({"center_args": {"name": "../x"}}, CenterError),
    "an unknown argument": ({"center_args": {"nmae": "a/b"}}, ConfigError),
    "no URL": ({"center": "/shared"}, CenterError),
    "no config": ({"save_config": False}, ConfigError),
    "a tag that JSON cannot hold": ({"list_tags": [object()]}, ConfigError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    arguments, error = REFUSED[case]
    delta = place("LoraModel", "mlp")
    delta.freeze_module()
    with unchanged(delta.backbone_model), pytest.raises(error):
        delta.save_finetuned("d", push_to_dc=True, **arguments)
    assert content(tmp_path) == {}
    delta.save_finetuned("d")
    assert same(AutoDeltaModel.from_finetuned("d", backbones.build("mlp")), delta)


def test_a_push_that_fails_leaves_the_saved_delta(tmp_path: Path) -> None:
    (tmp_path / "share").write_text("a file where a folder should be")
    delta = place("LoraModel", "mlp")
    delta.freeze_module()
    with pytest.raises(CenterError, match="The delta is saved in d") as caught:
        delta.save_finetuned("d", push_to_dc=True, center_args={"name": NAME})
    assert isinstance(caught.value.__cause__, CenterError)
    assert isinstance(caught.value.__cause__.__cause__, OSError)
    assert same(AutoDeltaModel.from_finetuned("d", backbones.build("mlp")), delta)


# --- where a name leads ---------------------------------------------------------------------------


def pushed(center: DeltaCenter, seed: int, **kwargs: Any) -> opendelta.DeltaBase:
    folder = Path(f"local {seed}")
    delta = saved(folder, seed)
    center.push(folder, NAME, **kwargs)
    return delta


def load(name: Any = NAME, **kwargs: Any) -> opendelta.DeltaBase:
    return AutoDeltaModel.from_finetuned(name, backbones.build("mlp"), **kwargs)


def test_a_local_folder_comes_first(center: DeltaCenter) -> None:
    there = pushed(center, 1)
    assert same(load(), there)
    here = saved(Path(NAME), 2)
    assert same(load(), here) and not same(load(), there)
    assert same(load(Path(NAME)), here)


@pytest.mark.parametrize("path", [Path(NAME), f"./{NAME}", "../nowhere", "/no/where"])
def test_what_can_only_be_a_path_is_one(center: DeltaCenter, path: Any) -> None:
    pushed(center, 1)
    with pytest.raises(CheckpointError, match="^There is no folder .* A delta is saved with"):
        load(path)


def test_the_center_says_which_version_is_the_current_one(center: DeltaCenter) -> None:
    first = pushed(center, 1)
    old = center.pull(NAME).name
    assert same(load(), first)
    second = pushed(center, 2)
    assert same(load(), second)
    assert same(load(revision=old), first)


@pytest.mark.parametrize("how", ["local_files_only", "environment", "no share"])
def test_offline_the_last_one_is_used_and_named(
    how: str, center: DeltaCenter, monkeypatch: pytest.MonkeyPatch, caplog: Any, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "opendelta")
    pushed(center, 1)
    load()
    second = pushed(center, 2)
    load()
    config = AutoDeltaConfig.from_finetuned(NAME)
    revision = center.pull(NAME).name
    pushed(center, 3)
    arguments = {}
    if how == "local_files_only":
        arguments = {"local_files_only": True}
    elif how == "environment":
        monkeypatch.setenv("DELTACENTER_OFFLINE", "1")
    else:
        (tmp_path / "share").rename(tmp_path / "unmounted")
    caplog.clear()
    assert same(load(**arguments), second)
    assert revision in caplog.text and NAME in caplog.text
    assert AutoDeltaConfig.from_finetuned(NAME, **arguments) == config
    with pytest.raises(UnreachableError):
        load("alice/other", **arguments)


def test_the_cache(center: DeltaCenter, tmp_path: Path) -> None:
    delta = pushed(center, 1)
    load(cache_dir=tmp_path / "mine")
    assert not (tmp_path / "cache").exists()
    load()
    assert (tmp_path / "cache" / "delta_center").is_dir()
    [weights] = (tmp_path / "mine").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="sha256"):
        load(cache_dir=tmp_path / "mine")
    assert same(load(cache_dir=tmp_path / "mine", force_download=True), delta)
    assert same(load(cache_dir=tmp_path / "mine"), delta)


def test_two_centers_do_not_mix(center: DeltaCenter, tmp_path: Path) -> None:
    other = DeltaCenter.from_url((tmp_path / "other").as_uri())
    first, second = pushed(center, 1), pushed(other, 2)
    assert same(load(), first) and same(load(center=other.url), second)
    assert same(load(center=other, local_files_only=True), second)
    assert same(load(local_files_only=True), first)


def test_another_backbone_is_told(center: DeltaCenter) -> None:
    pushed(center, 1)
    backbone = backbones.build("mlp")
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    with pytest.warns(BackboneMismatchWarning):
        AutoDeltaModel.from_finetuned(NAME, backbone)


@pytest.mark.parametrize("name", ["../x", "/etc", "C:/x", "a/b?c", "a\nb", "a/b/c", "x" * 5000, ""])
def test_what_is_neither_path_nor_name(name: str) -> None:
    for call in (load, AutoDeltaConfig.from_finetuned, LoraConfig.from_finetuned):
        with pytest.raises(CheckpointError, match="no folder|holds no config"):
            call(name)


@pytest.mark.parametrize("delta_type", ["os.system", "builtins.eval", "nothing", "../x", "", 5])
def test_a_config_that_names_no_method(
    delta_type: Any, center: DeltaCenter, tmp_path: Path
) -> None:
    saved(tmp_path / "d")
    text = (tmp_path / "d" / "config.json").read_text()
    (tmp_path / "d" / "config.json").write_text(
        text.replace('"delta_type": "lora"', f'"delta_type": {delta_type!r}'.replace("'", '"'))
    )
    center.push("d", NAME)
    with pytest.raises(ConfigError, match=re.escape(repr(delta_type)) if delta_type else "method"):
        load()


def test_a_pickle_in_the_place_of_weights(center: DeltaCenter, tmp_path: Path) -> None:
    proof = tmp_path / "proof"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.write_text, (proof, "exploded"))

    saved(tmp_path / "d")
    config = (tmp_path / "d" / "config.json").read_text()
    config = re.sub(r'"weights_\w+": "\w+(\.\w+)?",?', "", config)
    (tmp_path / "d" / "config.json").write_text(re.sub(r",\s*}", "}", config))
    (tmp_path / "d" / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, tmp_path / "d" / "pytorch_model.bin")
    center.push("d", NAME)
    with pytest.raises(CheckpointError, match=".safetensors"):
        load()
    assert not proof.exists()


# --- cards ----------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A delta on a backbone that `from_pretrained` finds, with all there is to say about it."""
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained("tiny/bert")
    model = BertForSequenceClassification.from_pretrained("tiny/bert")
    delta = LoraModel(model)
    delta.freeze_module(exclude=["deltas", "classifier"])
    delta.save_finetuned(
        "delta",
        push_to_dc=True,
        center_args={"name": NAME, "train_tasks": "sentiment", "license": "mit"},
        center_args_pool={"train_datasets": ["stanfordnlp/sst2"], "language": "en", "lr": 1},
        list_tags=["demo", "a: b"],
        dict_tags={"seed": 3},
        test_result={"accuracy": 0.93, "pipe|": "a\nb"},
        usage="Made for *short* reviews.",
    )
    return tmp_path / "delta"


def test_the_metadata_of_a_card(published: Path) -> None:
    data = metadata(published)
    assert data["library_name"] == "opendelta" and data["base_model"] == "tiny/bert"
    assert data["tags"] == ["opendelta", "lora", "demo", "a: b", "seed:3", "sentiment"]
    assert data["datasets"] == ["stanfordnlp/sst2"]
    assert (data["license"], data["language"]) == ("mit", "en")
    config = AutoDeltaConfig.from_finetuned(NAME)
    assert (config.list_tags, config.dict_tags) == (["demo", "a: b"], {"seed": 3})


def test_the_text_of_a_card(published: Path) -> None:
    text = (published / "README.md").read_text()
    # rank 8 on query and value: 2 * (16 * 8 + 8 * 16); classifier: 2 * 16 + 2
    backbone = BertForSequenceClassification.from_pretrained("tiny/bert")
    total = sum(p.numel() for p in backbone.parameters()) + 512
    carried = ["classifier.weight", "classifier.bias"]
    hashed = opendelta.gen_model_hash(backbone, excludes=carried, format=2)
    size = (published / "model.safetensors").stat().st_size
    for words in (
        "| method | lora |", "| backbone | tiny/bert |", hashed,
        "| parameters of the delta | 512 |", f"| trainable | 546 ({100 * 546 / total:.4g} %) |",
        f"| size | {size:,} bytes |", "| license | mit |", "| seed | 3 |", "| accuracy | 0.93 |",
        r"| pipe\| | a b |", "Made for *short* reviews.",
    ):  # fmt: skip
        assert words in text


def test_the_snippet_of_a_card_runs(published: Path) -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", snippet + "print(type(delta).__name__)"],
        capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "LoraModel\n"


def test_a_path_of_the_backbone_is_nobodys_business(tmp_path: Path) -> None:
    delta = place("LoraModel", "bert_cls")
    delta.backbone_model.config._name_or_path = "/home/alice/secret/bert"
    delta.freeze_module()
    delta.save_finetuned("d", push_to_dc=True, center_args={"name": NAME})
    assert "alice/secret" not in (tmp_path / "d" / "README.md").read_text()
    assert "base_model" not in metadata(tmp_path / "d")


def test_a_card_of_ones_own_stays(tmp_path: Path, center: DeltaCenter) -> None:
    delta = place("LoraModel", "mlp")
    delta.freeze_module()
    push = partial(delta.save_finetuned, "d", push_to_dc=True, center_args={"name": NAME})
    push(test_result="bad")
    push(test_result="better")
    text = (tmp_path / "d" / "README.md").read_text()
    assert "better" in text and "bad" not in text
    (tmp_path / "d" / "README.md").write_text("mine")
    push(test_result="best")
    assert center.info(NAME).card == "mine"


# --- configs --------------------------------------------------------------------------------------


def test_a_config_alone(center: DeltaCenter, tmp_path: Path) -> None:
    LoraConfig(lora_r=3).save_finetuned("configs/of-mine", push_to_hub=True)
    LoraConfig(lora_r=4).save_finetuned("c", push_to_hub=True, repo_id=NAME, temp_dir=True)
    assert not (tmp_path / "c").exists()
    assert center.list() == [NAME, "of-mine"]
    assert LoraConfig.from_finetuned("of-mine").lora_r == 3
    assert AutoDeltaConfig.from_finetuned(NAME, lora_alpha=5).lora_r == 4
    with pytest.raises(CheckpointError, match="holds neither"):
        load()


def test_the_config_of_a_delta_published_alone(center: DeltaCenter) -> None:
    pushed(center, 1)
    config = AutoDeltaConfig.from_finetuned(NAME)
    config.save_finetuned("alone", push_to_hub=True, repo_id="alice/config")
    assert set(center.info("alice/config").sizes) == {"config.json"}
    assert AutoDeltaConfig.from_finetuned("alice/config").delta_type == "lora"
    config = AutoDeltaConfig.from_finetuned("local 1")
    config.save_finetuned("local 1", push_to_hub=True, repo_id="alice/whole")
    assert load("alice/whole") is not None


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "www").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_url_of_a_config(web: str, tmp_path: Path) -> None:
    LoraConfig(lora_r=3).save_finetuned("www")
    url = f"{web}/config.json"
    with pytest.raises(UnreachableError):
        LoraConfig.from_finetuned(url, local_files_only=True)
    assert LoraConfig.from_finetuned(url).lora_r == 3
    LoraConfig(lora_r=4).save_finetuned("www")
    assert AutoDeltaConfig.from_finetuned(url, local_files_only=True).lora_r == 3
    assert AutoDeltaConfig.from_finetuned(url).lora_r == 4
    with pytest.raises(CenterError, match="404"):
        LoraConfig.from_finetuned(f"{web}/nothing.json")
    (tmp_path / "www" / "page").write_text("<html>")
    with pytest.raises(CheckpointError, match="JSON"):
        LoraConfig.from_finetuned(f"{web}/page")


def test_the_path_of_a_config_file(center: DeltaCenter) -> None:
    delta = saved(Path("d"), 1)
    assert same(load("d/config.json"), delta)
