"""What each of two processes does in the tests of the engines; started by `torchrun`.

``torchrun --nproc_per_node 2 tests/engines/worker.py ENGINE FOLDER`` (for Ray: without torchrun),
with the checkout and ``tests/golden`` on the ``PYTHONPATH``, runs the cases of one entry of
`ENGINES` and writes what each rank returned, or what went wrong, to ``FOLDER/results.json``. Most
train a method for five steps and save it from all ranks into ``FOLDER/case``.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backbones
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import opendelta
from opendelta import DeltaBase

METHODS: dict[str, Callable[[nn.Module], DeltaBase]] = {
    "LoRA": lambda model: opendelta.LoraModel(model, lora_r=4),
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


def zero(stage: int) -> Start:
    """DeepSpeed's ZeRO at a stage."""

    def start(put_on: Put) -> Run:
        import deepspeed

        model = bert()
        delta = put_on(model)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=sgd(model),
            config={
                "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
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


def lora_on_decoder(model: nn.Module, seed: int = 1) -> DeltaBase:
    torch.manual_seed(seed)
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


def tensor_parallel(case: str, folder: Path) -> Losses:
    def start(put_on: Put) -> Run:
        model = split_decoder(case, folder).train()
        return state_by_rank(put_on(model), model)  # the other kind knows no packed shards

    return both_ways(start, lora_on_decoder, folder, causal)


def split_loads(case: str, folder: Path) -> list[list[list[float]]]:
    """Logits of a split backbone that loads the file of a whole one."""
    if dist.get_rank() == 0:
        delta = lora_on_decoder(decoder(case))
        with torch.no_grad():
            for p in delta.parameters():
                p.normal_(std=0.1)
        delta.save_finetuned(folder / "delta")
    model = split_decoder(case, folder).eval()
    opendelta.AutoDeltaModel.from_finetuned(folder / "delta", model)
    with torch.no_grad():
        logits: Tensor = model(batches()[0]["input_ids"]).logits
    return logits.tolist()


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


def refused_on_fsdp1(kept: str, folder: Path) -> list[str]:
    """A delta on what FSDP1 flattened, and saving one that was put on before."""
    model = backbones.build("bert_cls")
    delta = put("LoRA", model)
    options: dict[str, Any] = {"use_orig_params": kept == "originals"}
    options["device_id"] = torch.device("cpu")
    wrapper = FullyShardedDataParallel(model, **options)
    acts = (
        lambda: opendelta.AdapterModel(wrapper),
        lambda: opendelta.AdapterModel(model),
        lambda: delta.save_finetuned(folder),
    )
    return [error_of(act) for act in acts]


def refused_on_fsdp2(case: str, folder: Path) -> str:
    """What cannot be put on a backbone that FSDP2 has sharded already."""
    if case == "a new bias":
        model = sharded(backbones.build("llama"))
        return error_of(lambda: opendelta.BitFitModel(model))
    if case == "shared parameters":
        model = sharded(backbones.build("bert_cls"))
        return error_of(lambda: opendelta.CompacterModel(model, shared_phm_rule=True))
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = backbones.build("bert_cls")
    plan = {"intermediate.dense": ColwiseParallel()}
    for layer in model.bert.encoder.layer:
        parallelize_module(layer, mesh["tensor"], plan)
        fully_shard(layer, mesh=mesh["data"])
    return error_of(lambda: opendelta.LoraModel(model))


def fsdp2_precision(case: str, folder: Path) -> list[str]:
    """In which dtype a delta that comes late runs, where layers have a policy and the root none."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = backbones.build("bert_cls")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    delta = METHODS[case](model)
    seen = set()
    for insertion in delta.insertions:
        insertion.module.register_forward_hook(
            lambda module, *_: seen.update(str(p.dtype) for p in module.parameters())
        )
    model(**share(batches()[0]))
    return sorted(seen)


def ranks_that_differ(how: str, folder: Path) -> str:
    """Ranks that do not construct the same delta on a sharded backbone, the second is another."""
    model = sharded(backbones.build("bert_cls"))
    second = dist.get_rank() == 1
    attention = model.bert.encoder.layer[1].attention.self
    if how == "methods" and second:  # the first rank would gather biases, the second nothing
        return error_of(lambda: opendelta.LoraModel(model))
    if how == "methods":
        return error_of(lambda: opendelta.BitFitModel(model))
    if how == "failures" and second:
        del attention.value
    if how == "shapes" and second:
        attention.value.in_features = 32
    rank, places = 5 if how == "arguments" and second else 4, ["1.attention.self.value"]
    return error_of(lambda: opendelta.LoraModel(model, rank, modified_modules=places))


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
    "ddp": (trains(ddp), OF_METHODS),
    "fsdp2": (trains(fsdp2), OF_METHODS[:-1]),
    "fsdp2_network": (fsdp2_network, ("before",)),
    "fsdp2_afterwards": (trains(fsdp2_afterwards), OF_METHODS),
    "fsdp2_late": (trains(fsdp2_late), OF_METHODS),
    "accelerate": (trains(accelerate), OF_METHODS),
    "ray": (trains(ray_train), OF_METHODS),
    "trainer": (trainer, OF_METHODS),
    "zero2": (trains(zero(2)), OF_METHODS),
    "zero3": (trains(zero(3)), OF_METHODS),
    "tensor_parallel": (tensor_parallel, tuple(PLANS)),
    "split_loads": (split_loads, tuple(PLANS)),
    "refused_on_split": (refused_on_split, ("Adapter", "BitFit", "Prefix")),
    "put_after_ddp": (put_after_ddp, ("wrapper", "module")),
    "refused_on_fsdp1": (refused_on_fsdp1, ("flat", "originals")),
    "refused_on_fsdp2": (refused_on_fsdp2, ("a new bias", "shared parameters", "two meshes")),
    "fsdp2_precision": (fsdp2_precision, ("LoRA", "Adapter")),
    "ranks_that_differ": (ranks_that_differ, ("methods", "arguments", "shapes", "failures")),
    "put_after_zero3": (put_after_zero3, ("new", "engine", "detached")),
    "hashes": (hashes, ("fsdp2",)),
    "unwritable": (unwritable, ("fsdp2",)),
    "switched": (switched, OF_METHODS),
}


def run_cases(engine: str, folder: Path) -> None:
    """In each of the processes, which are a group already."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    run, cases = ENGINES[engine]
    for case in cases:
        try:
            results[case] = run(case, folder / case)
        except Exception:
            traceback.print_exc()
            results[case] = traceback.format_exc()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, results)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(every))


def start_ray(folder: Path) -> None:
    """Ray starts the processes itself."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(num_cpus=2)
    TorchTrainer(
        lambda: run_cases("ray", folder),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(folder), name="run"),
    ).fit()
    ray.shutdown()


def main(engine: str, folder: Path) -> None:
    if engine == "ray":
        start_ray(folder)
        return
    dist.init_process_group("gloo")
    run_cases(engine, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
