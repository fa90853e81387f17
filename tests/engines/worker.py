"""What each of two processes does in the tests of the engines; started by `torchrun`.

``torchrun --nproc_per_node 2 tests/engines/worker.py ENGINE FOLDER`` trains each method for five
steps on an engine, saves it into ``FOLDER/method`` from all ranks, and writes the losses (or what
went wrong) to ``FOLDER/results.json``.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "golden")]

import backbones
import torch
import torch.distributed as dist
from torch import Tensor, nn

import opendelta
from opendelta import DeltaBase

METHODS: dict[str, dict[str, Any]] = {
    "LoraModel": {"lora_r": 4},
    "AdapterModel": {"bottleneck_dim": 4},
    "BitFitModel": {},
    "PrefixModel": {"prefix_token_num": 3, "reparameterize": True, "embed_dim": 8, "mid_dim": 8},
}
STEPS, ROWS, RATE = 5, 4, 0.02
Batch = dict[str, Tensor]
Step = Callable[[Batch], Tensor]  # trains on a batch and returns its loss


def batches() -> list[Batch]:
    """The data of five steps, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    return [
        {
            "input_ids": torch.randint(5, 120, (ROWS, 9), generator=generator),
            "labels": torch.randint(0, 3, (ROWS,), generator=generator),
        }
        for _ in range(STEPS)
    ]


def share(batch: Batch) -> Batch:
    """This rank's rows."""
    return {k: v.tensor_split(dist.get_world_size())[dist.get_rank()] for k, v in batch.items()}


def put(method: str, model: nn.Module) -> DeltaBase:
    """The delta whose values are the same in every process, with the classifier to be trained."""
    torch.manual_seed(1)
    delta: DeltaBase = getattr(opendelta, method)(model, **METHODS[method])
    delta.freeze_module(exclude=["deltas", "classifier"])
    return delta


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def steps_of(model: nn.Module) -> Step:
    """Plain training with `model`, which may be an engine's wrapper."""
    optimizer = sgd(model)

    def step(batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def train(step: Step, rows: Callable[[Batch], Batch] = share) -> list[float]:
    """Losses over five steps, averaged over the ranks."""
    losses = []
    for batch in batches():
        loss = step(rows(batch))
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


# --- engines: (method, folder) -> losses, the delta saved by all ranks -------------------------


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def ddp(method: str, folder: Path) -> list[float]:
    model = backbones.build("bert_cls").train()
    delta = put(method, model)
    losses = train(steps_of(nn.parallel.DistributedDataParallel(model)))
    delta.save_finetuned(folder)
    return losses


def fsdp2(method: str, folder: Path) -> list[float]:
    model = backbones.build("bert_cls").train()
    delta = put(method, model)
    losses = train(steps_of(sharded(model)))
    delta.save_finetuned(folder)
    return losses


def fsdp2_afterwards(method: str, folder: Path) -> list[float]:
    model = sharded(backbones.build("bert_cls").train())
    delta = put(method, model)
    losses = train(steps_of(model))
    delta.save_finetuned(folder)
    return losses


def fsdp2_late(method: str, folder: Path) -> list[float]:
    """The delta comes after the model has run, its values differ between the ranks at first."""
    model = sharded(backbones.build("bert_cls"))
    with torch.no_grad():
        model(**share(batches()[0]))
    model.train()
    torch.manual_seed(1 + dist.get_rank())
    delta: DeltaBase = getattr(opendelta, method)(model, **METHODS[method])
    delta.freeze_module(exclude=["deltas", "classifier"])
    losses = train(steps_of(model))
    delta.save_finetuned(folder)
    return losses


def accelerate(method: str, folder: Path) -> list[float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = backbones.build("bert_cls").train()
    delta = put(method, model)
    model, optimizer = accelerator.prepare(model, sgd(model))

    def step(batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = train(step)
    delta.save_finetuned(folder)
    return losses


def trainer(method: str, folder: Path, resume: str | None = None) -> list[float]:
    """The whole model is not saved, the delta at every other step."""
    model = backbones.build("bert_cls").train()
    delta = put(method, model)
    losses = trainer_for(model, delta, folder).train_from(resume)
    delta.save_finetuned(folder)
    return losses


def trainer_for(model: nn.Module, delta: DeltaBase, folder: Path) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        """Rows in order, as elsewhere, and losses as they are."""

        losses: list[float] = []

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            mean = loss.detach().clone()
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            self.losses.append(mean.item())
            return loss

        def train_from(self, checkpoint: str | None) -> list[float]:
            self.losses = []
            self.train(resume_from_checkpoint=checkpoint)
            return self.losses

    rows = [{k: v[row] for k, v in batch.items()} for batch in batches() for row in range(ROWS)]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=ROWS // (dist.get_world_size() if dist.is_initialized() else 1),
        num_train_epochs=1,
        save_steps=2,
        max_grad_norm=0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        average_tokens_across_devices=False,
    )
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    callbacks: list[TrainerCallback] = [opendelta.DeltaCallback(delta)]
    return InOrder(
        model=model,
        args=arguments,
        train_dataset=rows,
        optimizers=(optimizer, schedule),
        callbacks=callbacks,
    )


def zero(stage: int) -> Callable[[str, Path], list[float]]:
    """DeepSpeed's ZeRO at a stage."""

    def run(method: str, folder: Path) -> list[float]:
        import deepspeed

        model = backbones.build("bert_cls").train()
        delta = put(method, model)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=sgd(model),
            config={
                "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )

        def step(batch: Batch) -> Tensor:
            loss: Tensor = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            return loss.detach()

        losses = train(step)
        delta.save_finetuned(folder)
        return losses

    return run


ENGINES: dict[str, Callable[[str, Path], list[float]]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2_afterwards": fsdp2_afterwards,
    "fsdp2_late": fsdp2_late,
    "accelerate": accelerate,
    "trainer": trainer,
    "zero2": zero(2),
    "zero3": zero(3),
}


def main(engine: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for method in METHODS:
        try:
            results[method] = ENGINES[engine](method, folder / method)
        except Exception:
            results[method] = traceback.format_exc()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, results)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(every))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
