"""One process of a test of BMTrain: orders of putting on, refusals, who writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backbones
import torch
import weights
from bmt_job import BATCH, IDS, METHODS, evaluated, put, trained
from bmt_on_cpu import install
from torch import Tensor, nn

import opendelta
from opendelta.exceptions import ConfigError, InsertionError

engine: Any = install()
engine.init_distributed(seed=0)
MINE = slice(
    engine.rank() * BATCH // engine.world_size(), (engine.rank() + 1) * BATCH // engine.world_size()
)


def bert() -> nn.Module:
    return backbones.build("bert")


def losses(model: nn.Module, distributed: bool) -> Tensor:
    target = weights.uniform("target", evaluated(model).shape, 2.0)
    rows = MINE if distributed else slice(BATCH)
    return torch.tensor(trained(model, IDS[rows], target[rows], engine if distributed else None))


def before_wrapping(method: str) -> None:
    """Constructed on the plain backbone and frozen, then wrapped."""
    plain, model = bert(), bert()
    put(method, plain, plain=True)
    delta = put(method, model, plain=True)
    engine.BMTrainModelWrapper(model)
    torch.testing.assert_close(losses(model, True), losses(plain, False), atol=2e-6, rtol=0)
    torch.testing.assert_close(evaluated(model), evaluated(plain), atol=1e-5, rtol=0)
    assert sum(1 for _ in delta.parameters()) > 0  # which looks at what the wrapping made of them
    assert opendelta.num_delta_parameters(model) == opendelta.num_delta_parameters(plain)
    with delta.detached():
        torch.testing.assert_close(evaluated(model), evaluated(bert()))


def detached_while_wrapped(method: str) -> None:
    """Attached only after the wrapping, it joins BMTrain like a new one."""
    plain, model = bert(), bert()
    put(method, plain, plain=True)
    delta = put(method, model, plain=True)
    delta.detach()
    engine.BMTrainModelWrapper(model)
    delta.attach()
    kinds = {type(p) for p in delta.parameters()}
    assert kinds == {engine.DistributedParameter}, kinds
    torch.testing.assert_close(losses(model, True), losses(plain, False), atol=2e-6, rtol=0)


def prefix_is_refused() -> None:
    model = engine.BMTrainModelWrapper(bert())
    names = [name for name, _ in model.named_modules()]
    try:
        opendelta.PrefixModel(model)
    except ConfigError as error:
        assert "BMTrain" in str(error)
    else:
        raise AssertionError("a prefix was put on BMTrain")
    assert [name for name, _ in model.named_modules()] == names and not opendelta.deltas(model)


def on_a_block() -> None:
    """A pattern that names whole layers, which are in Blocks, and a delta of a custom shape."""
    plain, model = bert(), engine.BMTrainModelWrapper(bert())
    for one in (plain, model):
        torch.manual_seed(1)
        opendelta.AdapterModel(one, modified_modules=["layer.0", "layer.1"]).freeze_module()
    torch.testing.assert_close(losses(model, True), losses(plain, False), atol=2e-6, rtol=0)
    torch.testing.assert_close(evaluated(model), evaluated(plain), atol=1e-5, rtol=0)


def the_first_writes() -> None:
    """Every process saves, one of them writes, and the file is there for all."""
    delta = put("LoraModel", engine.BMTrainModelWrapper(bert()), plain=False)
    wrote = []

    def save(tensors: dict[str, Tensor], path: Any) -> None:
        wrote.append(path)
        torch.save(tensors, path)

    delta.save_finetuned("delta", save_function=save)
    assert bool(wrote) == (engine.rank() == 0)
    assert Path("delta", "pytorch_model.bin").exists()


def processes_that_differ_are_told() -> None:
    model = engine.BMTrainModelWrapper(bert())
    try:
        opendelta.LoraModel(model, lora_r=4 + engine.rank())
    except InsertionError as error:
        assert "'lora_r': 4" in str(error) and "'lora_r': 5" in str(error)
    else:
        raise AssertionError("two processes put different deltas on one backbone")
    assert not opendelta.deltas(model)


if __name__ == "__main__":
    for each in METHODS:
        if each != "CompacterModel":  # BMTrain's wrapper makes two of a parameter that is shared
            before_wrapping(each)
        detached_while_wrapped(each)
    prefix_is_refused()
    on_a_block()
    the_first_writes()
    if engine.world_size() > 1:
        processes_that_differ_are_told()
