"""LoRA with a Trainer: torchrun --nproc_per_node 2 examples/distributed/trainer.py

Each ``delta_checkpoints/trainer_run/checkpoint-N`` has a folder ``delta``; with ``resume`` behind
the command, a run goes on from the last one.
"""

from __future__ import annotations

import sys

import torch
from tiny import backbone, rows
from transformers import Trainer, TrainingArguments

from opendelta import DeltaCallback, LoraModel


def main() -> None:
    model = backbone()
    delta = LoraModel(model, lora_r=4)
    delta.freeze_module(exclude=["deltas", "classifier"])
    arguments = TrainingArguments(
        output_dir="delta_checkpoints/trainer_run",
        per_device_train_batch_size=8,
        num_train_epochs=4,
        learning_rate=1e-2,
        save_steps=4,
        logging_steps=2,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows(), callbacks=[DeltaCallback(delta)]
    )
    trainer.train(resume_from_checkpoint="resume" in sys.argv)

    if trainer.is_world_process_zero():
        delta.save_finetuned("delta_checkpoints/delta_trainer")


if __name__ == "__main__":
    main()
