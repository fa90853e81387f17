"""What deltas do on a backbone that FSDP2 has sharded, besides training."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import backbones
import torch
import torch.distributed as dist
from refusals import initialised
from splitting import lora_on_decoder, split_and_sharded, split_decoder
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import METHODS, batches, bert, put, sharded, share, steps_of, train, zero

import opendelta


class Shift(nn.Module):
    """A layer as a user may write it, whose `pre_forward` is called and not its `forward`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((width,), 0.1))

    def pre_forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden + self.shift, *args), kwargs


def fsdp2_own_layer(when: str, folder: Path) -> list[float]:
    model = bert()
    delta = put("LoRA", model)
    if when == "afterwards":
        sharded(model)
    for layer in model.bert.encoder.layer:
        delta.insert_module(layer.output.dense, "before", Shift(layer.output.dense.in_features))
    return train(steps_of(model if when == "afterwards" else sharded(model)))


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
    for part in delta.modules():
        if not list(part.children()):
            part.register_forward_hook(
                lambda module, *_: seen.update(str(p.dtype) for p in module.parameters())
            )
    model(**share(batches()[0]))
    return sorted(seen)


def hashes(engine: str, folder: Path) -> list[str]:
    """The hashes of a sharded backbone with a delta on it."""
    model = backbones.build("bert_cls")
    if engine == "fsdp2":
        put("LoRA", sharded(model))
    elif engine == "split":
        model = split_decoder("llama", folder)
        lora_on_decoder(model)
    else:
        put("LoRA", model)
        initialised(model, 3)
    return [opendelta.gen_model_hash(model, format=number) for number in (1, 2)]


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


def zero_switched(stage: str, folder: Path) -> dict[str, list[list[list[float]]]]:
    """Logits on DeepSpeed's engine, of each method: trained, detached, attached again."""
    found = {}
    for method in METHODS:
        if method == "SoftPrompt":
            continue  # it has a second host, which ZeRO-3's hooks of the first do not serve
        run = zero(int(stage))(functools.partial(put, method))
        train(run.step)
        model: Any = run.delta.backbone_model
        logits = [logits_of(model)]
        run.delta.detach()
        logits.append(logits_of(model))
        run.delta.attach()
        found[method] = [*logits, logits_of(model)]
    return found


def after_a_forward(what: str, folder: Path) -> bool:
    """Whether FSDP2's shards are what is used after a forward left whole tensors in places."""
    model = backbones.build("bert_cls")
    delta = put("BitFit" if what == "switch" else "Adapter", model)
    delta.save_finetuned(folder / str(dist.get_rank()))
    before = logits_of(model)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.1)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))  # one unit
    assert logits_of(model) != before
    if what == "load":
        delta.load_checkpoint(folder / str(dist.get_rank()))
        model.reshard()  # whole tensors are forgotten
        return torch.allclose(torch.tensor(logits_of(model)), torch.tensor(before), atol=1e-5)
    if what == "switch":
        delta.detach()
        without = logits_of(model)
        with delta.attached():
            logits_of(model)
        model.reshard()
        return logits_of(model) == without
    if what == "hash":
        return opendelta.gen_model_hash(model) == opendelta.gen_model_hash(
            backbones.build("bert_cls")
        )
    if what == "callback":  # the first rank's folder holds what it takes all ranks to save
        state: Any = SimpleNamespace(is_world_process_zero=dist.get_rank() == 0, global_step=1)
        arguments: Any = SimpleNamespace(output_dir=folder)
        opendelta.DeltaCallback(delta).on_save(arguments, state, None)
        return (folder / "checkpoint-1" / "delta" / "model.safetensors").exists()
    return who_writes(delta, folder / "saved") == [0]


def who_writes(delta: opendelta.DeltaBase, folder: Path) -> list[int]:
    """The ranks that write where all of them save."""
    wrote = []

    def save(tensors: dict[str, Tensor], path: Any) -> None:
        wrote.append(dist.get_rank())
        torch.save(tensors, path)

    delta.save_finetuned(folder, save_function=save)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, wrote)
    return [rank for ranks in every for rank in ranks]


def two_meshes(case: str, folder: Path) -> list[int]:
    """Who writes a delta on what is sharded on one mesh and split on another."""
    model = bert()
    delta = put("LoRA", model)
    split_and_sharded(model)
    return who_writes(delta, folder)


def logits_of(model: nn.Module) -> list[list[float]]:
    with torch.no_grad():
        logits: Tensor = model.eval()(**batches()[0]).logits
    return logits.tolist()
