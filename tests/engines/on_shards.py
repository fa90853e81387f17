"""What deltas do on a backbone that FSDP2 has sharded, besides training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backbones
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import METHODS, batches, bert, put, sharded, share, steps_of, train

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
    for insertion in delta.insertions:
        insertion.module.register_forward_hook(
            lambda module, *_: seen.update(str(p.dtype) for p in module.parameters())
        )
    model(**share(batches()[0]))
    return sorted(seen)


def hashes(engine: str, folder: Path) -> list[str]:
    """The hash of a sharded backbone with a delta on it."""
    model = backbones.build("bert_cls")
    if engine == "fsdp2":
        put("LoRA", sharded(model))
    return [opendelta.gen_model_hash(model)]


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
