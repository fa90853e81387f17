"""What engines, or deltas on them, refuse: the errors that each rank sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import torch
import torch.distributed as dist
from splitting import split_and_sharded, split_decoder
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from training import METHODS, batches, put, sgd, sharded, share

import opendelta


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
    """On the wrapper at once, inside it at each forward with gradients."""
    model, rows = backbones.build("bert_cls"), share(batches()[0])
    if where == "attached":
        delta = put("LoRA", model)
        delta.detach()
    wrapper = nn.parallel.DistributedDataParallel(model)
    if where == "wrapper":
        return [error_of(lambda: opendelta.LoraModel(wrapper))]
    if where == "attached":
        wrapper(**rows).loss.backward()
        delta.attach()
    else:
        put("LoRA", model)
    if where == "looked at":
        model(**rows)
        with torch.no_grad():
            wrapper(**rows)
    return [error_of(lambda: wrapper(**rows)) for _ in range(2)]


def fsdp2_network(when: str, folder: Path) -> str:
    """A network that generates all prefixes, sharded with the first of them."""
    model = backbones.build("bert_cls")
    put("Prefix from a network", model)
    sharded(model)
    return error_of(lambda: model(**share(batches()[0])))


def initialised(model: nn.Module, stage: int) -> Any:
    """DeepSpeed's engine around a model."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    return engine


def put_after_zero(which: str, folder: Path) -> str:
    """A delta that is new, on the backbone or on the engine, or was detached when ZeRO-3 came."""
    model = backbones.build("bert_cls")
    delta = put("LoRA", model)
    if which == "detached":
        delta.detach()
    engine = initialised(model, 2 if which == "engine" else 3)
    if which == "detached":
        return error_of(delta.attach)
    return error_of(lambda: opendelta.AdapterModel(engine if which == "engine" else model))


def put_after_zero2(method: str, folder: Path) -> list[str]:
    """What is warned of: nothing on the first delta, the order on the second, new or attached."""
    model = backbones.build("bert_cls")
    if method == "attached":
        second = opendelta.AdapterModel(model)
        second.detach()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", opendelta.DeltaWarning)
        first = put("LoRA", model)
        initialised(model, 2)
        first.detach()
        first.attach()
        if method == "attached":
            second.attach()
        else:
            METHODS[method](model)
    return [str(one.message) for one in told if one.category is opendelta.DeltaWarning]


def refused_on_fsdp1(kept: str, folder: Path) -> list[str]:
    """A delta on what FSDP1 flattened, and saving one that was put on before."""
    model = backbones.build("bert_cls")
    delta = METHODS["LoRA"](model)
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
    model = backbones.build("bert_cls")
    if case == "shared parameters":
        sharded(model)
        return error_of(lambda: opendelta.CompacterModel(model, shared_phm_rule=True))
    if case == "a soft prompt":
        sharded(model)
        return error_of(lambda: METHODS["SoftPrompt"](model))
    split_and_sharded(model)
    return error_of(lambda: opendelta.LoraModel(model))


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


def loads_that_differ(how: str, folder: Path) -> str:
    """Ranks that do not read the same file: the second's is stale, missing or not to be read."""
    mine, second = folder / str(dist.get_rank()), dist.get_rank() == 1
    delta = put("LoRA", backbones.build("bert_cls"), seed=1 + second)
    if not (second and how == "missing"):
        delta.save_finetuned(mine)
    if second and how == "damaged":
        (mine / "model.safetensors").write_bytes(b"")
    model = sharded(backbones.build("bert_cls"))
    if how == "into a delta":
        delta = put("LoRA", model)
        return error_of(lambda: delta.load_checkpoint(mine))
    return error_of(lambda: opendelta.AutoDeltaModel.from_finetuned(mine, model))


def unwritable(engine: str, folder: Path) -> str:
    """Saving where the first rank cannot write."""
    model = backbones.build("bert_cls")
    delta = put("LoRA", model)
    if engine == "zero3":
        initialised(model, 3)
    else:
        sharded(model)
    if engine == "a foreign folder":
        mine = folder / str(dist.get_rank())
        mine.mkdir(parents=True)
        if dist.get_rank() == 0:
            (mine / "config.json").write_text("{}")
        return error_of(lambda: delta.save_finetuned(mine))

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    return error_of(lambda: delta.save_finetuned(folder, save_function=fail))
