"""What each of two processes does in the tests of the engines; started by `torchrun`.

``torchrun --nproc_per_node 2 tests/engines/worker.py ENGINE FOLDER``, with the checkout and
``tests/golden`` on the ``PYTHONPATH``, runs the cases of one entry of `ENGINES` and writes what
each rank returned, or what went wrong, to ``FOLDER/results.json``. Most train a method for five
steps and save it from all ranks into ``FOLDER/case``.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import torch
import torch.distributed as dist
from torch import Tensor, nn

import opendelta
from opendelta import DeltaBase

METHODS: dict[str, Callable[[nn.Module], DeltaBase]] = {
    "LoRA": lambda model: opendelta.LoraModel(model, lora_r=4),
    "Adapter": lambda model: opendelta.AdapterModel(model, bottleneck_dim=4),
    "BitFit": opendelta.BitFitModel,
    "Prefix": lambda model: opendelta.PrefixModel(model, 3, reparameterize=False),
    "Prefix from a network": lambda model: opendelta.PrefixModel(model, 3, embed_dim=8, mid_dim=8),
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
    delta = METHODS[method](model)
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
    delta = METHODS[method](model)
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
                "gradient_clipping": 0.0,
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


# --- tensor parallelism: every rank has the same rows ---------------------------------------------

PLANS: dict[str, Any] = {
    "llama": "auto",
    "phi3": "auto",  # fused projections, gathered
    "phi3_packed": {  # a fused projection of which each rank has a piece of each part
        "model.layers.*.mlp.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    },
}


def decoder(case: str) -> nn.Module:
    """A tiny decoder, its weights by name."""
    if case == "llama":
        return backbones.build("llama")
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Phi3ForCausalLM(Phi3Config(**sizes, **heads, **tokens))


def lora_on_decoder(model: nn.Module) -> DeltaBase:
    torch.manual_seed(1)
    delta = opendelta.LoraModel(model, lora_r=4, modified_modules=["self_attn", "mlp", "lm_head"])
    delta.freeze_module()
    return delta


def causal(batch: Batch) -> Batch:
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}


def split_decoder(case: str, folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if dist.get_rank() == 0:
        decoder(case).save_pretrained(folder / "backbone")
    dist.barrier()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder / "backbone", tp_plan=PLANS[case], dtype=torch.float32
    )
    return model


def tensor_parallel(case: str, folder: Path) -> list[float]:
    model = split_decoder(case, folder).train()
    delta = lora_on_decoder(model)
    losses = train(steps_of(model), causal)
    delta.save_finetuned(folder)
    return losses


# --- what is refused, and what is on all ranks ----------------------------------------------------


def error_of(attempt: Callable[[], Any]) -> str:
    """The error that `attempt` raises."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused_on_split(method: str, folder: Path) -> str:
    model = split_decoder("llama", folder)
    return error_of(lambda: METHODS[method](model))


def put_after_ddp(where: str, folder: Path) -> list[str]:
    """On the wrapper at once, inside it at each forward."""
    wrapper = nn.parallel.DistributedDataParallel(backbones.build("bert_cls"))
    if where == "wrapper":
        return [error_of(lambda: opendelta.LoraModel(wrapper))]
    opendelta.LoraModel(wrapper.module).freeze_module()
    return [error_of(lambda: wrapper(**share(batches()[0]))) for _ in range(2)]


def fsdp2_network(when: str, folder: Path) -> str:
    """A network that generates all prefixes, sharded with the first of them."""
    model = backbones.build("bert_cls")
    put("Prefix from a network", model)
    sharded(model)
    return error_of(lambda: model(**share(batches()[0])))


def put_after_zero3(which: str, folder: Path) -> str:
    """A delta that is new, on the backbone or the engine, or was detached when ZeRO-3 came."""
    import deepspeed

    model = backbones.build("bert_cls")
    delta = put("LoRA", model)
    if which == "detached":
        delta.detach()
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    if which == "detached":
        return error_of(delta.attach)
    return error_of(lambda: opendelta.AdapterModel(engine if which == "engine" else model))


def ranks_that_differ(how: str, folder: Path) -> str:
    """Ranks that do not construct the same delta on a sharded backbone."""
    model = sharded(backbones.build("bert_cls"))
    names = {
        "plans": ("query", "value"),
        "ranks": ("query", "query"),
        "failures": ("query", "no_such_module"),
    }[how]
    rank = 4 + dist.get_rank() * (how == "ranks")
    name = names[dist.get_rank()]
    return error_of(lambda: opendelta.LoraModel(model, lora_r=rank, modified_modules=[name]))


def hashes(engine: str, folder: Path) -> list[str]:
    """The hash of a sharded backbone with a delta on it."""
    model = backbones.build("bert_cls")
    if engine == "fsdp2":
        put("LoRA", sharded(model))
    return [opendelta.gen_model_hash(model)]


def unwritable(engine: str, folder: Path) -> str:
    """Saving where the first rank cannot write."""
    model = sharded(backbones.build("bert_cls"))
    delta = put("LoRA", model)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    return error_of(lambda: delta.save_finetuned(folder, save_function=fail))


def switched(method: str, folder: Path) -> list[list[list[float]]]:
    """Logits of a sharded backbone: trained, switched, loaded into another, and without a delta."""
    model = sharded(backbones.build("bert_cls"))
    before = logits_of(model)
    delta = put(method, model)
    train(steps_of(model.train()))
    delta.save_finetuned(folder)
    trained = logits_of(model)
    delta.detach()
    without = logits_of(model)
    with delta.attached():
        again = logits_of(model)
    after = logits_of(model)
    delta.remove()
    removed = logits_of(model)
    # The classifier was trained too: it is put back by loading into a fresh backbone.
    fresh = sharded(backbones.build("bert_cls"))
    assert logits_of(fresh) == before
    opendelta.AutoDeltaModel.from_finetuned(folder, fresh)
    loaded = logits_of(fresh)
    return [trained, again, loaded, without, after, removed]


def logits_of(model: nn.Module) -> list[list[float]]:
    with torch.no_grad():
        logits: Tensor = model.eval()(**batches()[0]).logits
    return logits.tolist()


OF_METHODS = tuple(METHODS)
ENGINES: dict[str, tuple[Callable[[str, Path], Any], tuple[str, ...]]] = {
    "ddp": (ddp, OF_METHODS),
    "fsdp2": (fsdp2, OF_METHODS[:-1]),
    "fsdp2_network": (fsdp2_network, ("before",)),
    "fsdp2_afterwards": (fsdp2_afterwards, OF_METHODS),
    "fsdp2_late": (fsdp2_late, OF_METHODS),
    "accelerate": (accelerate, OF_METHODS),
    "trainer": (trainer, OF_METHODS),
    "zero2": (zero(2), OF_METHODS),
    "zero3": (zero(3), OF_METHODS),
    "tensor_parallel": (tensor_parallel, tuple(PLANS)),
    "refused_on_split": (refused_on_split, ("Adapter", "BitFit", "Prefix")),
    "put_after_ddp": (put_after_ddp, ("wrapper", "module")),
    "ranks_that_differ": (ranks_that_differ, ("plans", "ranks", "failures")),
    "put_after_zero3": (put_after_zero3, ("new", "engine", "detached")),
    "hashes": (hashes, ("fsdp2",)),
    "unwritable": (unwritable, ("fsdp2",)),
    "switched": (switched, OF_METHODS),
}


def main(engine: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    run, cases = ENGINES[engine]
    for case in cases:
        try:
            results[case] = run(case, folder / case)
        except Exception:
            results[case] = traceback.format_exc()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, results)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(every))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
