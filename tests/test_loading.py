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
from placed import PLACED_METHODS, classifier, place, told, unchanged
from safetensors.torch import load_file, save_file
from saved import loaded, names, output, trained

import opendelta
from opendelta import AutoDeltaModel, DeltaBase, LoraConfig, LoraModel, OpenDeltaError
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


# --- weights alone -------------------------------------------------------------------------------


each_method = pytest.mark.parametrize("method", PLACED_METHODS)


@each_method
@pytest.mark.parametrize("file", ["x.safetensors", "x.bin", "x.pt", "folder", "folder/new/x.bin"])
def test_checkpoints_round_trip(method: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    delta = trained(method, "bert_cls", exclude=["deltas", "classifier"])
    delta.save_checkpoint(tmp_path / file)
    target = place(method, "bert_cls")
    target.freeze_module(exclude=["deltas", "classifier"])
    assert not torch.equal(output(target, "bert_cls"), output(delta, "bert_cls"))
    target.load_checkpoint(str(tmp_path / file))
    assert torch.equal(output(target, "bert_cls"), output(delta, "bert_cls"))


@each_method
def test_beside_a_merged_delta(method: str, tmp_path: Path) -> None:
    trained(method, "mlp").save_finetuned(tmp_path)
    other = LoraModel(backbones.build("mlp"), modified_modules=["first"], lora_r=2)
    randomise(other)
    other.merge()
    before = output(other, "mlp")
    delta = AutoDeltaModel.from_finetuned(tmp_path, other.backbone_model, check_hash=False)
    assert (output(delta, "mlp") - before).abs().max() > 1e-3
    delta.remove()
    assert torch.equal(output(other, "mlp"), before)


def test_the_suffix_decides_the_format(tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp")
    for file, read in (
        ("x.safetensors", load_file),
        ("x.bin", lambda path: torch.load(path, weights_only=True)),
        ("x.pt", lambda path: torch.load(path, weights_only=True)),
    ):
        delta.save_checkpoint(tmp_path / file)
        assert set(read(tmp_path / file)) == names(delta)
    delta.save_checkpoint(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names(delta)
    assert not (tmp_path / "config.json").exists()


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp")
    delta.save_checkpoint(tmp_path / "new")
    target = place("LoraModel", "mlp")
    target.load_checkpoint(tmp_path / "new")
    assert torch.equal(output(target, "mlp"), output(delta, "mlp"))


def test_checkpoint_functions_of_ones_own(tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp")
    calls = []

    def save(tensors: Any, path: str) -> None:
        calls.append(set(tensors))
        save_file(tensors, path)

    def load(path: str) -> Any:
        calls.append(path)
        return load_file(path)

    delta.save_checkpoint(tmp_path / "odd.name", save, delta.backbone_model)
    target = place("LoraModel", "mlp")
    target.load_checkpoint(tmp_path / "odd.name", load, target.backbone_model)
    assert calls == [names(delta), str(tmp_path / "odd.name")]
    assert torch.equal(output(target, "mlp"), output(delta, "mlp"))


def test_load_checkpoint_reads_what_save_finetuned_wrote(tmp_path: Path) -> None:
    for save_function in (None, torch.save):
        delta = trained("LoraModel", "bert_cls", exclude=["deltas", "classifier"])
        delta.save_finetuned(tmp_path / str(save_function is None), save_function=save_function)
        target = place("LoraModel", "bert_cls")
        target.load_checkpoint(tmp_path / str(save_function is None))
        assert torch.equal(output(target, "bert_cls"), output(delta, "bert_cls"))


def test_load_checkpoint_leaves_the_train_mode(tmp_path: Path) -> None:
    trained("LoraModel", "mlp").save_checkpoint(tmp_path)
    target = place("LoraModel", "mlp")
    target.backbone_model.train()
    target.load_checkpoint(tmp_path)
    assert target.backbone_model.training


# --- loading -------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("loader", ["own", "auto", "base"])
def test_who_may_load(method: str, loader: str, tmp_path: Path) -> None:
    delta = trained(method, "bert_cls")
    delta.save_finetuned(tmp_path)
    cls: Any = {"own": type(delta), "auto": AutoDeltaModel, "base": DeltaBase}[loader]
    model = backbones.build("bert_cls").train()
    again = cls.from_finetuned(str(tmp_path), model)
    assert type(again) is type(delta)
    assert again.backbone_model is model
    assert opendelta.deltas(model) == [again]
    assert not any(module.training for module in model.modules())


def test_from_finetuned_by_position(tmp_path: Path) -> None:
    """path, backbone, config, cache_dir, state_dict, as the specification orders them."""
    delta = trained("LoraModel", "mlp")
    tensors = {name: p.detach() for name, p in delta.named_parameters()}
    for cls in (LoraModel, AutoDeltaModel):
        again = cls.from_finetuned(None, backbones.build("mlp"), delta.config, None, tensors)
        assert torch.equal(output(again, "mlp"), output(delta, "mlp"))


@pytest.mark.parametrize("form", [lambda c: c, lambda c: c.to_dict()], ids=["object", "dict"])
@each_method
def test_without_a_path(method: str, form: Callable[[Any], Any], tmp_path: Path) -> None:
    delta = trained(method, "bert_cls", exclude=["deltas", "classifier"])
    delta.save_finetuned(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for cls in (type(delta), AutoDeltaModel):
        again = cls.from_finetuned(
            None, backbones.build("bert_cls"), delta_config=form(delta.config), state_dict=tensors
        )
        assert torch.equal(output(again, "bert_cls"), output(delta, "bert_cls"))


@pytest.mark.parametrize("missing", ["delta_config", "state_dict"])
def test_without_a_path_both_are_needed(missing: str) -> None:
    delta = trained("LoraModel", "mlp")
    both: dict[str, Any] = {"delta_config": delta.config, "state_dict": delta.state_dict()}
    del both[missing]
    model = backbones.build("mlp")
    with unchanged(model), pytest.raises(OpenDeltaError, match="delta_config.*state_dict"):
        AutoDeltaModel.from_finetuned(None, model, **both)


def test_a_config_or_tensors_in_place_of_the_folders(tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp", lora_alpha=16)
    delta.save_finetuned(tmp_path)
    config = LoraConfig.from_dict(delta.config.to_dict(), lora_alpha=32)
    other = AutoDeltaModel.from_finetuned(tmp_path, backbones.build("mlp"), delta_config=config)
    assert other.lora_alpha == 32
    assert not torch.allclose(output(other, "mlp"), output(delta, "mlp"))
    zeros = {name: torch.zeros_like(p) for name, p in delta.named_parameters()}
    other = AutoDeltaModel.from_finetuned(tmp_path, backbones.build("mlp"), state_dict=zeros)
    assert not any(p.any() for p in other.parameters())


def test_keyword_arguments_override_the_files_config(tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp")
    delta.save_finetuned(tmp_path)
    for cls in (LoraModel, AutoDeltaModel):
        again = cls.from_finetuned(tmp_path, backbones.build("mlp"), lora_dropout=0.5)
        assert again.lora_dropout == 0.5 and again.config.lora_dropout == 0.5
        with pytest.raises(OpenDeltaError, match="'lora_droput'.*'lora_dropout'"):
            cls.from_finetuned(tmp_path, backbones.build("mlp"), lora_droput=0.5)


def test_arguments_of_downloads_are_accepted(tmp_path: Path) -> None:
    delta = trained("LoraModel", "mlp")
    delta.save_finetuned(tmp_path)
    again = loaded(
        tmp_path,
        "mlp",
        cache_dir=tmp_path,
        force_download=True,
        local_files_only=True,
        check_hash=True,
    )
    assert torch.equal(output(again, "mlp"), output(delta, "mlp"))


def test_the_loaded_delta_trains_on(tmp_path: Path) -> None:
    """Its parameters are real leaves with fresh gradients, on which one step acts."""
    trained("LoraModel", "mlp").save_finetuned(tmp_path)
    again = loaded(tmp_path, "mlp")
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in again.parameters())
    again.freeze_module()
    before = output(again, "mlp")
    again.backbone_model(**backbones.inputs("mlp")).sum().backward()
    with torch.no_grad():
        for p in again.parameters():
            p.sub_(p.grad)
    assert not torch.equal(output(again, "mlp"), before)
