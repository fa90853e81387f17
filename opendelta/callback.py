"""`DeltaCallback`: the delta in each of a transformers `Trainer`'s checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opendelta.backends.sharding import is_sharded
from opendelta.basemodel import DeltaBase

FOLDER = "delta"


class DeltaCallback(TrainerCallback):
    """Writes a delta into each checkpoint folder of a Trainer, under ``delta/``.

    ``Trainer(..., callbacks=[DeltaCallback(delta)])`` is all there is to do. The folder
    ``checkpoint-500/delta`` is one that `save_finetuned` wrote. ``resume_from_checkpoint`` reads
    what the Trainer itself saves beside it.

    Args:
        delta: what to save; it is on the Trainer's model.
    """

    def __init__(self, delta: DeltaBase) -> None:
        self.delta = delta

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save, after the Trainer has: on the first rank, on all of them where that takes all."""
        if state.is_world_process_zero or is_sharded(self.delta.backbone_model):
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self.delta.save_finetuned(checkpoint / FOLDER)
