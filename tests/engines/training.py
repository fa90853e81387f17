"""How deltas train on the engines, and how training is resumed: what one of two processes does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backbones
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import opendelta
from opendelta import DeltaBase

METHODS: dict[str, Callable[[nn.Module], DeltaBase]] = {
    "DoRA": lambda model: opendelta.DoraModel(model, lora_r=4),
    "IA3": opendelta.IA3Model,
    "LoRA": lambda model: opendelta.LoraModel(model, lora_r=4),
    "Own head": lambda model: opendelta.LoraModel(model, lora_r=4, own_modules=["classifier"]),
    "Adapter": lambda model: opendelta.AdapterModel(model, bottleneck_dim=4),
    "BitFit": opendelta.BitFitModel,
    "Prefix": lambda model: opendelta.PrefixModel(model, 3, reparameterize=False),
    "SoftPrompt": lambda model: opendelta.SoftPromptModel(model, soft_token_num=3),
    "Prefix from a network": lambda model: opendelta.PrefixModel(model, 3, embed_dim=8, mid_dim=8),
}
STEPS, HALF, ROWS = 5, 2, 4
Batch = dict[str, Tensor]
Step = Callable[[Batch], Tensor]  # trains on a batch and returns its loss
Put = Callable[..., DeltaBase]  # puts a delta on a backbone


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


def put(method: str, model: nn.Module, seed: int = 1) -> DeltaBase:
    """An untrained delta, with the classifier to be trained."""
    torch.manual_seed(seed)
    delta = METHODS[method](model)
    delta.freeze_module(exclude=["deltas", "classifier"])
    return delta


def saved(folder: Path, model: nn.Module, seed: int = 1) -> DeltaBase:
    """A trained delta, to be trained on."""
    delta = opendelta.AutoDeltaModel.from_finetuned(folder, model)
    delta.freeze_module(exclude=["deltas", *(delta.left_trainable or ())])
    model.train()
    return delta


def save_to_go_on(delta: DeltaBase, folder: Path) -> None:
    """Save a delta to be trained on: with the network that generates prefixes."""
    if isinstance(delta, opendelta.PrefixModel):
        delta.save_finetuned(folder, keep_reparameterization=True)
    else:
        delta.save_finetuned(folder)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with a state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.02, momentum=0.8)


def steps_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Step:
    """Plain training with `model`, which may be an engine's wrapper."""
    optimizer = optimizer or sgd(model)

    def step(batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def train(
    step: Step, rows: Callable[[Batch], Batch] = share, part: slice = slice(STEPS)
) -> list[float]:
    """Losses over five steps or a part of them, averaged over the ranks."""
    losses = []
    for batch in batches()[part]:
        loss = step(rows(batch))
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


# --- engines: how a backbone gets on them ---------------------------------------------------------


@dataclass
class Run:
    """A delta on an engine: how it trains, and how the optimizer's state is kept in a folder."""

    delta: DeltaBase
    step: Step
    save: Callable[[Path], Any]
    load: Callable[[Path], Any]


Start = Callable[[Put], Run]
Losses = dict[str, list[float]]


def both_ways(
    start: Start, fresh: Put, folder: Path, rows: Callable[[Batch], Batch] = share
) -> Losses:
    """Train at one go and save; train, save, start anew and go on, with all or the delta alone."""
    whole = start(fresh)
    losses = train(whole.step, rows)
    whole.delta.save_finetuned(folder)
    whole.save(folder.with_name(f"{folder.name} whole"))  # the engine is as it was

    half = folder.with_name(f"{folder.name} half")
    first = start(fresh)
    resumed = train(first.step, rows, slice(HALF))
    save_to_go_on(first.delta, half)
    first.save(half / "engine")
    second = start(functools.partial(saved, half))
    second.load(half / "engine")
    resumed += train(second.step, rows, slice(HALF, None))

    third = start(functools.partial(fresh, seed=2))
    third.delta.load_checkpoint(half)
    loaded = train(third.step, rows, slice(HALF, None))
    return {"losses": losses, "resumed": resumed, "loaded": loaded}


def trains(start: Start) -> Callable[[str, Path], Losses]:
    return lambda method, folder: both_ways(start, functools.partial(put, method), folder)


def bert() -> nn.Module:
    return backbones.build("bert_cls").train()


def state_by_rank(delta: DeltaBase, model: nn.Module) -> Run:
    """Each rank keeps what its optimizer has."""
    optimizer = sgd(model)

    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(optimizer.state_dict(), folder / f"{dist.get_rank()}.pt")

    def load(folder: Path) -> None:
        state = torch.load(folder / f"{dist.get_rank()}.pt", weights_only=False)  # has DTensors
        optimizer.load_state_dict(state)

    return Run(delta, steps_of(model, optimizer), save, load)


def state_of_all(delta: DeltaBase, model: nn.Module) -> Run:
    """All ranks write one state, PyTorch's distributed checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state

    optimizer = sgd(model)

    def save(folder: Path) -> None:
        dcp.save(dcp_state.get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)

    def load(folder: Path) -> None:
        state = dcp_state.get_optimizer_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=folder)
        dcp_state.set_optimizer_state_dict(model, optimizer, state)

    return Run(delta, steps_of(model, optimizer), save, load)


def ddp(put_on: Put) -> Run:
    model = bert()
    delta = put_on(model)
    return state_by_rank(delta, nn.parallel.DistributedDataParallel(model))


def ray_train(put_on: Put) -> Run:
    from ray.train.torch import prepare_model

    model = bert()
    delta = put_on(model)
    return state_by_rank(delta, prepare_model(model))


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2, layer by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for layer in stacks[0]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp2(put_on: Put) -> Run:
    model = bert()
    delta = put_on(model)
    return state_of_all(delta, sharded(model))


def fsdp2_afterwards(put_on: Put) -> Run:
    model = sharded(bert())
    return state_of_all(put_on(model), model)


def fsdp2_detached(put_on: Put) -> Run:
    """The delta is off the model while that is sharded, its values differ between the ranks."""
    model = bert()
    delta = put_on(model, seed=1 + dist.get_rank())
    with delta.detached():
        sharded(model)
    return state_of_all(delta, model)


def fsdp2_late(put_on: Put) -> Run:
    """The delta comes after the model has run, its values differ between the ranks at first."""
    model = sharded(bert())
    with torch.no_grad():
        model.eval()(**share(batches()[0]))
    model.train()
    return state_of_all(put_on(model, seed=1 + dist.get_rank()), model)


def accelerate(put_on: Put) -> Run:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = bert()
    delta = put_on(model)
    model, optimizer = accelerator.prepare(model, sgd(model))

    def step(batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Run(delta, step, accelerator.save_state, accelerator.load_state)


def zero(stage: int, partitioned: bool = False) -> Start:
    """DeepSpeed's ZeRO at a stage, the backbone partitioned already when the delta comes, or not.

    `from_pretrained` partitions where a config of stage 3 is at hand.
    """
    config = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }

    def start(put_on: Put) -> Run:
        import deepspeed

        model = bert()
        if partitioned:
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        delta = put_on(model)
        engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)

        def step(batch: Batch) -> Tensor:
            loss: Tensor = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            return loss.detach()

        return Run(delta, step, engine.save_checkpoint, engine.load_checkpoint)

    return start


def trainer(method: str, folder: Path) -> Losses:
    """A Trainer saves for itself, the delta and the optimizer's state at every other step."""
    model = bert()
    delta = put(method, model)
    losses = trainer_for(model, delta, folder).train_from(None)
    delta.save_finetuned(folder)
    model = bert()
    second = trainer_for(model, put(method, model, seed=2), folder)
    rest = second.train_from(str(folder / "run" / f"checkpoint-{HALF}"))
    return {"losses": losses, "resumed": losses[:HALF] + rest}


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
        save_steps=HALF,
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
