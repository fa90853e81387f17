"""The callback for transformers' Trainer: what its checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import backbones
import torch
from transformers import Trainer, TrainingArguments

import opendelta
from opendelta import DeltaCallback, LoraModel


def _trainer(folder: Path, steps: int) -> tuple[Trainer, opendelta.DeltaBase]:
    """A Trainer that saves every second step, its delta the same each time."""
    torch.manual_seed(0)
    model = backbones.build("bert_cls")
    delta = LoraModel(model, lora_r=4)
    delta.freeze_module(exclude=["deltas", "classifier"])
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 120, (16, 9), generator=generator)
    rows = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(ids)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    callbacks = [DeltaCallback(delta)]
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks), delta


def _trained(delta: opendelta.DeltaBase) -> dict[str, torch.Tensor]:
    """What the trainers above train: the delta and the classifier."""
    delta.freeze_module(exclude=["deltas", "classifier"])
    return delta.backbone_model.state_dict()


def test_each_checkpoint_of_a_trainer_holds_the_delta_of_that_step(tmp_path: Path) -> None:
    trainer, delta = _trainer(tmp_path, steps=4)
    trainer.train()
    folders = [tmp_path / f"checkpoint-{step}" / "delta" for step in (2, 4)]
    loaded = []
    for folder in folders:
        model = backbones.build("bert_cls")
        loaded.append(_trained(LoraModel.from_finetuned(folder, model)))
    trained = _trained(delta)
    assert loaded[1].keys() == trained.keys() and "classifier.weight" in trained
    assert all(torch.equal(loaded[1][name], tensor) for name, tensor in trained.items())
    assert not any(torch.equal(loaded[0][n], tensor) for n, tensor in trained.items())


def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    trainer, delta = _trainer(tmp_path / "whole", steps=4)
    trainer.train()
    first, _ = _trainer(tmp_path / "parts", steps=2)
    first.train()
    second, resumed = _trainer(tmp_path / "parts", steps=4)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    expected = _trained(delta)
    for name, tensor in _trained(resumed).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
