"""An unmodified `transformers.Trainer` trains a delta: checkpoints, best model, resuming.

python examples/tutorial/4_with_trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from sentences import COMPLAINTS, PRAISE, QUESTIONS, STATEMENTS, backbone, labelled
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments

from opendelta import AutoDeltaModel, LoraModel

FOLDER = "delta_checkpoints/with_trainer"


def rows(no: list[str], yes: list[str]) -> list[dict[str, Tensor]]:
    batch, labels = labelled(no, yes)
    columns = {**batch, "labels": labels}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(labels))]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    chosen = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float((chosen == prediction.label_ids).mean())}


def main() -> None:
    model = backbone()
    delta = LoraModel(model)
    delta.freeze_module(exclude=["deltas", "classifier"])

    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                run,
                num_train_epochs=8,
                per_device_train_batch_size=8,
                learning_rate=5e-3,
                eval_strategy="epoch",
                save_strategy="epoch",
                load_best_model_at_end=True,
                metric_for_best_model="accuracy",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows(COMPLAINTS, PRAISE),
            eval_dataset=rows(COMPLAINTS[::2], PRAISE[::2]),
            compute_metrics=accuracy,
        )
        trainer.train()
        checkpoint = trainer.state.best_model_checkpoint
        assert checkpoint is not None
        size = Path(checkpoint, "model.safetensors").stat().st_size
        print(f"A checkpoint's weights take {size / 1000:,.0f} kB: those that train.")
        print(f"Accuracy: {trainer.evaluate()['eval_accuracy']:.2f}")

    delta.save_finetuned(FOLDER)
    device = next(model.parameters()).device  # where the Trainer moved it
    fresh = backbone().to(device)
    AutoDeltaModel.from_finetuned(FOLDER, backbone_model=fresh)
    batch = {k: v.to(device) for k, v in labelled(STATEMENTS, QUESTIONS)[0].items()}
    assert torch.equal(fresh(**batch).logits, model.eval()(**batch).logits)
    print(f"Saved in {FOLDER}, loaded into a fresh backbone: the same logits.")


if __name__ == "__main__":
    main()
