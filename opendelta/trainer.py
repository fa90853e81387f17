"""With transformers' `Trainer`: a delta in each checkpoint, and training on a quantised model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opendelta.backends.sharding import is_sharded, reshard
from opendelta.basemodel import DeltaBase
from opendelta.exceptions import InsertionError
from opendelta.ground.files import IN_CHECKPOINT
from opendelta.mechanism.backbone_state import deltas
from opendelta.mechanism.engines import require_whole


class DeltaCallback(TrainerCallback):
    """Writes a delta into each checkpoint folder of a Trainer, under ``delta/``; steps with it.

    ``Trainer(..., callbacks=[DeltaCallback(delta)])`` is all there is to do. The folder
    ``checkpoint-500/delta`` is one that `save_finetuned` wrote, and
    ``from_finetuned("checkpoint-500", model)`` loads it. ``resume_from_checkpoint`` reads what the
    Trainer itself saves beside it, which is what trains, not a whole model.

    After each step of the optimizer the delta's `on_step` is called, while gradients are there;
    under DeepSpeed, which steps by itself, they are gone.

    Args:
        delta: what to save; it is on the Trainer's model.
    """

    def __init__(self, delta: DeltaBase) -> None:
        self.delta = delta

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let the delta act after a step, which the Trainer counts only afterwards."""
        self.delta.on_step(state.global_step + 1)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save, after the Trainer has: on the first rank, on all of them where that takes all."""
        backbone = self.delta.backbone_model
        require_whole(backbone)  # on all ranks alike
        reshard(backbone)
        if state.is_world_process_zero or is_sharded(backbone):
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self.delta.save_finetuned(checkpoint / IN_CHECKPOINT)


@contextmanager
def quantised_training(model: nn.Module) -> Iterator[nn.Module]:
    """Let `transformers.Trainer` be built on a quantised model that carries deltas.

    The trainer refuses "purely quantized models" and knows PEFT's adapters alone. Within the block
    the model says that it has some; afterwards it does not, so that ``save_pretrained`` stays what
    it is::

        with opendelta.quantised_training(model):
            trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()

    Args:
        model: a quantised transformers model with a delta on it.

    Raises:
        InsertionError: if no delta is on it: its own weights cannot train.
    """
    if not deltas(model):
        raise InsertionError(
            f"No delta is on this {type(model).__name__}, and quantised weights cannot train: put "
            "one on first, such as LoraModel(model)."
        )
    attributes, flag = model.__dict__, "_hf_peft_config_loaded"
    before = {flag: attributes[flag]} if flag in attributes else {}
    attributes[flag] = True
    try:
        yield model
    finally:
        del attributes[flag]
        attributes.update(before)
