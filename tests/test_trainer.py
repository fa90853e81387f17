"""With transformers' Trainer: what its folders hold, how they are loaded, what is told of them."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import backbones
import pytest
import torch
import weights
from cases import IMPOSSIBLE, METHODS, built, randomise
from placed import unchanged
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from opendelta import (
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    BitFitModel,
    DeltaBase,
    DeltaCallback,
    DeltaWarning,
    LoraModel,
)
from opendelta.exceptions import CheckpointError


def vit() -> nn.Module:
    """A classifier of pictures, whose modules have other names in files than in the model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes, **dropout)
    return weights.fill(ViTForImageClassification(config)).eval()


class Net(nn.Module):
    """A classifier of tokens that is no transformer and has no config."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(120, 8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(self.inner(self.embedding(input_ids)).relu().mean(1))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


RUNS: dict[str, Any] = {
    "bert": lambda: backbones.build("bert_cls"),
    "vit": vit,
    "net": lambda: weights.fill(Net()).eval(),
}


def examples(kind: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "vit":
        return torch.randn(count, 3, 8, 8, generator=generator)
    return torch.randint(5, 120, (count, 9), generator=generator)


@torch.no_grad()
def classify(kind: str, model: nn.Module) -> Tensor:
    return model.eval()(examples(kind, 4))["logits"]


def run(kind: str, folder: Path, steps: int, **arguments: Any) -> tuple[Trainer, DeltaBase]:
    """A Trainer that saves each second step; LoRA and the head train."""
    torch.manual_seed(0)
    model = RUNS[kind]()
    delta = LoraModel(model, lora_r=4, modified_modules=["inner"] if kind == "net" else None)
    delta.freeze_module(exclude=["deltas", "classifier"])
    name = "pixel_values" if kind == "vit" else "input_ids"
    rows = [{name: x, "labels": torch.tensor(i % 3)} for i, x in enumerate(examples(kind, 16))]
    settings: dict[str, Any] = {"learning_rate": 1e-2, "report_to": [], "disable_tqdm": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            lr_scheduler_type="constant",
            save_steps=2,
            use_cpu=True,
            **{**settings, **arguments},
        ),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[DeltaCallback(delta)],
    )
    return trainer, delta


@pytest.fixture(scope="module", params=RUNS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A kind of model, the folder of a run of four steps, the delta after it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    trainer, delta = run(request.param, folder, steps=4)
    trainer.train()
    return request.param, folder, delta


def _trained(delta: DeltaBase) -> dict[str, Tensor]:
    """What the trainers above train: the delta and the classifier."""
    delta.freeze_module(exclude=["deltas", "classifier"])
    return delta.backbone_model.state_dict()


def test_each_checkpoint_of_a_trainer_holds_the_delta_of_that_step(done: Any) -> None:
    kind, folder, delta = done
    loaded = [
        _trained(LoraModel.from_finetuned(folder / f"checkpoint-{step}" / "delta", RUNS[kind]()))
        for step in (2, 4)
    ]
    trained = _trained(delta)
    assert loaded[1].keys() == trained.keys() and "classifier.weight" in trained
    assert all(torch.equal(loaded[1][name], tensor) for name, tensor in trained.items())
    assert not any(torch.equal(loaded[0][n], tensor) for n, tensor in trained.items())


def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(done: Any, tmp_path: Path) -> None:
    kind, folder, delta = done
    trainer, resumed = run(kind, tmp_path, steps=4)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert trainer.state.global_step == 4
    expected = _trained(delta)
    for name, tensor in _trained(resumed).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_the_best_model_of_a_trainer_is_loaded_again(kind: str, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer, delta = run(kind, tmp_path, 4, learning_rate=1.0, **best)
    trainer.train()
    where = str(trainer.state.best_model_checkpoint)
    assert where.endswith("checkpoint-2")  # else what it ended with would do
    LoraModel.from_finetuned(Path(where) / "delta", model := RUNS[kind]())
    assert torch.equal(classify(kind, delta.backbone_model), classify(kind, model))


class Noting(LoraModel):
    """LoRA that notes its steps, and whose A's are each pulled down by one in the loss."""

    seen: ClassVar[list[tuple[int, bool, bool]]] = []

    def on_step(self, step: int) -> None:
        named = dict(self.named_parameters())
        has_gradients = all(p.grad is not None for p in named.values())
        has_moved = all(p.abs().sum() > 0 for name, p in named.items() if name.endswith("lora_B"))
        self.seen.append((step, has_gradients, has_moved))

    def loss_term(self) -> Tensor:
        return torch.stack([p.sum() for n, p in self.named_parameters() if "lora_A" in n]).sum()


def _noting(backbone: str, folder: Path, **arguments: Any) -> tuple[Trainer, Noting]:
    """A Trainer with plain SGD."""
    torch.manual_seed(0)
    model = backbones.build(backbone)
    delta = Noting(model, lora_r=4)
    delta.freeze_module()
    ids = torch.randint(5, 120, (16, 9), generator=torch.Generator().manual_seed(3))
    labels: Any = [i % 3 for i in range(16)]
    if backbone == "llama":  # which have a different number of tokens to predict in each row
        labels = [row.where(torch.arange(9) < 9 - i % 8, -100) for i, row in enumerate(ids)]
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    settings = TrainingArguments(
        output_dir=str(folder),
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    callbacks = [DeltaCallback(delta)]
    return Trainer(model=model, args=settings, train_dataset=rows, callbacks=callbacks), delta


def test_the_delta_acts_after_each_step_while_gradients_are_there(tmp_path: Path) -> None:
    Noting.seen.clear()
    trainer, _ = _noting("bert_cls", tmp_path, max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert Noting.seen == [(step, True, True) for step in (1, 2, 3)]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("backbone", ["bert_cls", "llama"])
def test_what_a_delta_adds_to_the_loss_counts_once_a_step(
    backbone: str, parts: int, tmp_path: Path
) -> None:
    trainer, delta = _noting(
        backbone,
        tmp_path,
        max_steps=1,
        gradient_accumulation_steps=parts,
        per_device_train_batch_size=16 // parts,
    )
    before = {n: p.detach().clone() for n, p in delta.named_parameters() if "lora_A" in n}
    trainer.train()
    for name, p in delta.named_parameters():
        if name in before:  # which get no other gradient at first, for the B's are zero
            torch.testing.assert_close(p.detach(), before[name] - 0.1)


# --- loading from a Trainer's folders -------------------------------------------------------------


def test_a_checkpoint_with_a_delta_is_named_by_its_own_folder(done: Any, tmp_path: Path) -> None:
    kind, folder, delta = done
    checkpoint = shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    bare = classify(kind, model := RUNS[kind]())
    loaded = AutoDeltaModel.from_finetuned(str(checkpoint), model)
    assert type(loaded) is LoraModel and loaded.lora_r == 4
    assert torch.equal(classify(kind, model), classify(kind, delta.backbone_model))
    assert not torch.equal(classify(kind, model), bare)
    assert AutoDeltaConfig.from_finetuned(checkpoint).lora_r == 4
    (checkpoint / "delta" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="delta.config.json is not valid JSON"):
        AutoDeltaModel.from_finetuned(checkpoint, RUNS[kind]())


def test_without_the_callback_the_tensors_that_are_there_are_loaded(
    done: Any, tmp_path: Path
) -> None:
    kind, folder, delta = done
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(folder / "checkpoint-4", checkpoint, ignore=lambda *_: ["delta"])
    trained = classify(kind, delta.backbone_model)
    with unchanged(model := RUNS[kind]()), pytest.raises(CheckpointError) as refused:
        AutoDeltaModel.from_finetuned(checkpoint, model)
    ways = ("delta_config=", f"delta.load_checkpoint({str(checkpoint)!r})", "DeltaCallback(delta)")
    assert [way in str(refused.value) for way in ways] == [True, True, True]
    another = LoraModel(RUNS[kind](), lora_r=4, modified_modules=delta.config.modified_modules)
    another.freeze_module(exclude=["deltas", "classifier"])
    another.save_finetuned(tmp_path / "other")  # whose config vouches for another file
    saved = AutoDeltaConfig.from_finetuned(tmp_path / "other")
    modules = delta.config.modified_modules
    written = {"delta_type": "lora", "lora_r": 4, "modified_modules": modules}
    for config in (saved, delta.config, saved.to_dict(), written):
        AutoDeltaModel.from_finetuned(checkpoint, model := RUNS[kind](), delta_config=config)
        assert torch.equal(classify(kind, model), trained)
    with unchanged(model := RUNS[kind]()), pytest.raises(CheckpointError, match=r"\(4, .*\(2, "):
        AutoDeltaModel.from_finetuned(checkpoint, model, delta_config={**written, "lora_r": 2})
    other = LoraModel(model := RUNS[kind](), lora_r=4, modified_modules=modules)
    other.load_checkpoint(checkpoint)
    assert torch.equal(classify(kind, model), trained)


HEADS = {"bert_cls": "classifier", "llama": "lm_head", "vit": "pooler"}
FOLDERS = [(m, b) for m in METHODS for b in HEADS if (m, b) not in IMPOSSIBLE]


@pytest.mark.filterwarnings("ignore:What is saved here:opendelta.DeltaWarning")
@pytest.mark.parametrize(("method", "backbone"), FOLDERS)
def test_three_ways_out_of_a_folder_of_save_pretrained(
    method: str, backbone: str, tmp_path: Path
) -> None:
    model, delta = built(method, backbone)
    randomise(delta)
    delta.freeze_module(exclude=["deltas", HEADS[backbone]])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if HEADS[backbone] in name:
                p.copy_(weights.uniform("trained:" + name, p.shape, 0.25))
    model.save_pretrained(tmp_path)
    bare, trained = backbones.build(backbone), backbones.run(model, backbone)
    assert not torch.equal(backbones.run(bare, backbone), trained)

    AutoDeltaModel.from_finetuned(tmp_path, bare, delta_config=delta.config)
    assert torch.equal(backbones.run(bare, backbone), trained)
    second, again = built(method, backbone)
    again.load_checkpoint(tmp_path)
    assert torch.equal(backbones.run(second, backbone), trained)
    third, frozen = built(method, backbone)
    frozen.freeze_module(exclude=["deltas", HEADS[backbone]])
    third.load_state_dict(load_file(tmp_path / "model.safetensors"))  # as a Trainer resumes
    assert torch.equal(backbones.run(third, backbone), trained)


def test_which_folder_is_the_deltas(tmp_path: Path) -> None:
    """A folder that is a delta's is taken for itself; one with checkpoints is pointed into."""
    for name, rank in (("out", 2), ("out/delta", 3), ("run/checkpoint-9/delta", 4)):
        LoraModel(backbones.build("bert_cls"), lora_r=rank).save_finetuned(tmp_path / name)
    assert AutoDeltaConfig.from_finetuned(tmp_path / "out").lora_r == 2
    LoraModel(backbones.build("bert_cls"), lora_r=5).save_finetuned(
        tmp_path / "run" / "checkpoint-10" / "delta"
    )
    with pytest.raises(CheckpointError, match=r"name one of them, such as .*checkpoint-10'"):
        AutoDeltaConfig.from_finetuned(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no delta was saved there.$"):
        (tmp_path / "empty").mkdir()
        AutoDeltaConfig.from_finetuned(tmp_path / "empty")


# --- what is told when a trimmed model is saved ---------------------------------------------------


@contextmanager
def told() -> Iterator[list[str]]:
    """The warnings of the library in a block."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if issubclass(w.category, DeltaWarning)]


def test_a_trainer_tells_of_its_model_folder_and_not_of_its_checkpoints(tmp_path: Path) -> None:
    trainer, delta = run("bert", tmp_path / "out", steps=2)
    with told() as messages:
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").is_file() and messages == []
    with told() as messages:
        trainer.save_model(str(tmp_path / "model"))
    (message,) = messages
    trains = [name for name, p in delta.backbone_model.named_parameters() if p.requires_grad]
    assert f"{len(trains)} tensors" in message
    assert {*load_file(tmp_path / "model" / "model.safetensors")} == {*trains}
    with told() as messages:
        trainer.save_model(str(tmp_path / "again"))
        trainer.train()
    assert messages == []


@pytest.mark.parametrize("method", METHODS)
def test_save_pretrained_of_a_trimmed_model_tells_once(method: str, tmp_path: Path) -> None:
    model, delta = built(method, "bert_cls")
    delta.freeze_module()
    with told() as messages:
        model.state_dict()
        torch.save(model.state_dict(), tmp_path / "state.pt")
        delta.save_finetuned(tmp_path / "delta")
        with delta.detached:
            model.save_pretrained(tmp_path / "bare")
    assert messages == []
    with told() as messages:
        model.save_pretrained(tmp_path / "trimmed")
        model.save_pretrained(tmp_path / "again")
    (message,) = messages
    assert "delta.save_finetuned(folder)" in message and "delta.merge()" in message
    with told() as messages:
        copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    assert len(messages) == 1  # of another backbone


@pytest.mark.parametrize("cls", [LoraModel, BitFitModel, AdapterModel])
def test_the_whole_model_is_written_as_the_warning_says(cls: Any, tmp_path: Path) -> None:
    model = backbones.build("bert_cls")
    delta = cls(model)
    randomise(delta)
    delta.freeze_module()
    tuned = backbones.run(model, "bert_cls")
    with told() as messages:
        if cls is AdapterModel:  # which cannot be merged
            with delta.detached:
                model.save_pretrained(tmp_path)
            delta.save_finetuned(tmp_path / "delta")
        else:
            delta.merge()
            model.save_pretrained(tmp_path)
    assert messages == []
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    if cls is AdapterModel:
        AutoDeltaModel.from_finetuned(tmp_path, loaded)
    torch.testing.assert_close(backbones.run(loaded, "bert_cls"), tuned, atol=1e-6, rtol=0)


def test_a_part_that_carries_the_delta_tells_too(tmp_path: Path) -> None:
    """Also where what is saved is around it. Nothing is told of a function of the user's own."""

    def save_model(model: nn.Module) -> None:
        model.state_dict()

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, intermediate_size=16, **sizes))
    delta = LoraModel(model.bert)
    with told() as messages:
        model.save_pretrained(tmp_path)  # all of the backbone, and the delta
        delta.freeze_module()
        save_model(model)
    assert messages == []
    with told() as messages:
        model.save_pretrained(tmp_path)
    assert len(messages) == 1 and "whole BertModel" in messages[0]


class Wrapper(torch.nn.Module):
    """As of sentence-transformers: what is saved is the model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = backbones.build("bert_cls")

    def forward(self, **given: Any) -> Any:
        return self.inner(**given)

    def save(self, folder: Path) -> None:
        self.inner.save_pretrained(folder)


@pytest.mark.parametrize("cls", [LoraModel, BitFitModel, AdapterModel])
def test_a_wrapper_that_saves_the_model_inside_tells_too(cls: Any, tmp_path: Path) -> None:
    model = Wrapper()
    delta = cls(model)
    with told() as messages:
        delta.freeze_module()
        model.inner.state_dict()
        with delta.detached:
            model.save(tmp_path / "bare")
    assert messages == []
    with told() as messages:
        for name in ("x", "y"):
            model.save(tmp_path / name)
    (message,) = messages
    assert "loaded untuned" in message and "delta.save_finetuned" in message
    delta.remove()
    assert not model.inner._state_dict_hooks and not model.inner._load_state_dict_pre_hooks
