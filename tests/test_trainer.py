"""The callback for transformers' Trainer: what its checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import backbones
import pytest
import torch
from torch import Tensor
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
