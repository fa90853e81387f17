"""Loading a delta's files: who may, what overrides, and files that are damaged."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import built, randomise
from pieces import parameter_names
from placed import classifier, place, told, unchanged
from safetensors.torch import load_file, save_file

import opendelta
from opendelta import AutoDeltaModel, LoraConfig, LoraModel, OpenDeltaError
from opendelta.exceptions import CheckpointError

# --- bad backbones -------------------------------------------------------------------------------


def test_nothing_is_loaded_onto_a_backbone_without_storage(tmp_path: Path) -> None:
    """On the meta device weights would vanish: loading says so and puts nothing on."""
    source, delta = built("LoraModel", "bert")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    with torch.device("meta"):
        empty = type(source)(source.config)
    before = parameter_names(empty)
    for check_hash in (True, False):
        with pytest.raises(CheckpointError, match="meta"):
            LoraModel.from_finetuned(tmp_path, backbone_model=empty, check_hash=check_hash)
        assert parameter_names(empty) == before
        assert opendelta.deltas(empty) == []


# --- damaged and foreign weights -----------------------------------------------------------------


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.file, "exploded"))


@pytest.fixture(params=["safetensors", "torch"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A good delta with a trained classifier, in either format."""
    delta = place("LoraModel", "bert_cls")
    randomise(delta)
    delta.freeze_module(exclude=["deltas", "classifier"])
    function = torch.save if request.param == "torch" else None
    delta.save_finetuned(tmp_path, save_function=function)
    return tmp_path


def weights_file(folder: Path) -> Path:
    (file,) = (path for path in folder.iterdir() if path.name != "config.json")
    return file


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors in a folder's weights file."""
    file = weights_file(folder)
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    else:
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)


def exchange(tensors: dict[str, torch.Tensor], **new: torch.Tensor) -> None:
    """Put other tensors in the place of all."""
    tensors.clear()
    tensors.update({name.replace("__", "."): tensor for name, tensor in new.items()})


def without_checksum(folder: Path) -> None:
    """As in a folder that 0.3.2 wrote, where only the file itself can tell."""
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))


def cut(folder: Path, share: float) -> None:
    content = weights_file(folder).read_bytes()
    weights_file(folder).write_bytes(content[: int(len(content) * share)])


A_KEY = "bert.encoder.layer.1.attention.self.value.lora.lora_B"


DAMAGES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "empty": (lambda f: cut(f, 0), ("cannot be read",)),
    "cut early": (lambda f: cut(f, 0.01), ("cannot be read",)),
    "cut late": (lambda f: cut(f, 0.95), ("cannot be read",)),
    "text": (lambda f: weights_file(f).write_text("<html>not found</html>"), ()),
    "a key less": (lambda f: rewrite(f, lambda t: t.pop(A_KEY)), ("missing", A_KEY)),
    "a classifier less": (
        lambda f: rewrite(f, lambda t: t.pop("classifier.bias")),
        ("missing", "classifier.bias"),
    ),
    "a key more": (
        lambda f: rewrite(f, lambda t: t.update({"head.weight": torch.ones(1)})),
        ("unexpected", "head.weight"),
    ),
    "another model's": (
        lambda f: rewrite(f, lambda t: exchange(t, transformer__wte__weight=torch.ones(2, 2))),
        ("missing", "unexpected", "transformer.wte.weight", "lora_A"),
    ),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({A_KEY: torch.ones(64, 3)})),
        (A_KEY, "(64, 3)", "(64, 8)"),
    ),
    "no keys": (lambda f: rewrite(f, lambda t: t.clear()), ("missing", "lora_A")),
}


READABLE = (
    "a key less",
    "a classifier less",
    "a key more",
    "another model's",
    "another shape",
    "no keys",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_files(damage: str, folder: Path, model: Any) -> None:
    hurt, words = DAMAGES[damage]
    hurt(folder)
    without_checksum(folder)
    if damage not in READABLE:
        words = (*words, weights_file(folder).name)
    for cls in (AutoDeltaModel, LoraModel):
        with unchanged(model), pytest.raises(RuntimeError) as caught:
            cls.from_finetuned(folder, model)
        told(caught.value, words)
    if damage == "a classifier less":
        return  # the config's list says that it belongs to the file; here no config is read
    target = place("LoraModel", "bert_cls", model)
    target.freeze_module(exclude=["deltas", "classifier"])
    for path in (folder, weights_file(folder)):
        with unchanged(model), pytest.raises(RuntimeError) as caught:
            target.load_checkpoint(path)
        told(caught.value, words)


@pytest.mark.parametrize("damage", ["cut late", "a key more", "another shape"])
def test_a_file_that_was_exchanged_is_told_by_its_sha256(damage: str, folder: Path) -> None:
    DAMAGES[damage][0](folder)
    model = classifier(carrying=False)
    with unchanged(model), pytest.raises(RuntimeError, match="sha256") as caught:
        AutoDeltaModel.from_finetuned(folder, model)
    told(caught.value, (weights_file(folder).name, "config.json"))


def test_weights_that_are_not_there(folder: Path, model: Any) -> None:
    weights_file(folder).unlink()
    with unchanged(model), pytest.raises(OpenDeltaError) as caught:
        AutoDeltaModel.from_finetuned(folder, model)
    told(caught.value, (str(folder), "model.safetensors", "pytorch_model.bin"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.anything"])
def test_a_pickle_that_would_run_code(name: str, tmp_path: Path, model: Any) -> None:
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module()
    delta.save_finetuned(tmp_path, save_function=torch.save)
    without_checksum(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    proof, file = tmp_path / "proof", tmp_path / name
    for dump in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))):
        for content in ({"a": Bomb(proof)}, Bomb(proof)):
            dump(content, file)
            target = place("LoraModel", "bert_cls", model)
            calls = [lambda target=target: target.load_checkpoint(file)]
            if name == "pytorch_model.bin":
                calls.append(lambda: AutoDeltaModel.from_finetuned(tmp_path, model))
                calls.append(lambda target=target: target.load_checkpoint(tmp_path))
            for call in calls:
                with unchanged(model), pytest.raises(RuntimeError) as caught:
                    call()
                told(caught.value, (name, ".safetensors"))
                assert not proof.exists()
            target.remove()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        {"a": 1},
        {1: torch.ones(1)},
        torch.ones(1),
        {"a": {"b": torch.ones(1)}},
        "text",
    ],
    ids=lambda content: type(content).__name__,
)
def test_a_plain_file_of_something_else(content: Any, tmp_path: Path, model: Any) -> None:
    torch.save(content, tmp_path / "x.bin")
    target = place("LoraModel", "bert_cls", model)
    with unchanged(model), pytest.raises(RuntimeError) as caught:
        target.load_checkpoint(tmp_path / "x.bin")
    told(caught.value, ("x.bin", "dict of tensors"))


def test_a_reader_that_fails_or_gives_nonsense(tmp_path: Path, model: Any) -> None:
    target = place("LoraModel", "bert_cls", model)
    (tmp_path / "x").write_text("x")

    def fail(path: str) -> Any:
        raise KeyError("no such format")

    for read, words in (
        (fail, ("x", "no such format")),
        (lambda path: [1], ("x", "dict of tensors")),
    ):
        with unchanged(model), pytest.raises(RuntimeError) as caught:
            target.load_checkpoint(tmp_path / "x", read)
        told(caught.value, words)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"a": 1}, {"classifier.bias": torch.ones(3)}, [1], "x"],
    ids=["empty", "numbers", "half", "list", "text"],
)
def test_a_state_dict_of_ones_own(tensors: Any, model: Any) -> None:
    config = LoraConfig(modified_modules=["query"])
    with unchanged(model), pytest.raises(OpenDeltaError):
        AutoDeltaModel.from_finetuned(None, model, delta_config=config, state_dict=tensors)


def test_a_backbone_of_another_size(folder: Path) -> None:
    """Keys fit, shapes do not: nothing is loaded."""
    import transformers

    small = transformers.BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=160, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(small)
    with unchanged(model), pytest.raises(RuntimeError) as caught:
        AutoDeltaModel.from_finetuned(folder, model, check_hash=False)
    told(caught.value, ("lora_A", "(8, 64)", "(8, 32)"))


def test_a_backbone_of_another_kind(folder: Path) -> None:
    model = backbones.build("gpt2")
    with unchanged(model), pytest.raises(OpenDeltaError, match="'query'"):
        AutoDeltaModel.from_finetuned(folder, model, check_hash=False)


def test_a_deeper_backbone(folder: Path) -> None:
    """One of its layers would stay untrained: it is refused, naming the missing keys."""
    import transformers

    config = backbones.build("bert_cls").config
    config.num_hidden_layers = 3
    model = transformers.BertForSequenceClassification(config)
    with unchanged(model), pytest.raises(RuntimeError, match=r"missing.*layer\.2\."):
        AutoDeltaModel.from_finetuned(folder, model, check_hash=False)
