"""The methods that rescale what a module gives, DoRA and (IA)³: what both keep."""

from __future__ import annotations

import copy
from pathlib import Path

import backbones
import pytest
import torch
from peft_reference import close, random_net, randomise
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import AutoDeltaModel, DeltaBase, DoraModel, IA3Model, LoraModel

BACKBONES = ["bert", "roberta", "deberta", "gpt2", "opt", "t5", "bart", "llama", "vit"]
of_both = pytest.mark.parametrize("method", [DoraModel, IA3Model])


@of_both
@pytest.mark.parametrize("backbone", BACKBONES)
def test_identity_gradients_and_files(
    method: type[DeltaBase], backbone: str, tmp_path: Path
) -> None:
    bare = backbones.run(backbones.build(backbone), backbone)
    model = backbones.build(backbone)
    delta = method(model)
    assert torch.equal(backbones.run(model, backbone), bare)
    delta.freeze_module()
    randomise(delta)
    backbones.run.__wrapped__(model, backbone).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in delta.parameters())
    acting = backbones.run(model, backbone)
    assert (acting - bare).abs().max() > 1e-3
    delta.save_finetuned(tmp_path)
    fresh = backbones.build(backbone)
    assert type(AutoDeltaModel.from_finetuned(tmp_path, fresh)) is method
    assert torch.equal(backbones.run(fresh, backbone), acting)
    with delta.detached():
        assert torch.equal(backbones.run(model, backbone), bare)
    assert torch.equal(backbones.run(copy.deepcopy(model), backbone), acting)


@of_both
@pytest.mark.parametrize("beside", ["itself", "LoRA"])
@pytest.mark.parametrize("backbone", ["bert", "gpt2", "llama"])
def test_rows_of_a_batch(method: type[DeltaBase], beside: str, backbone: str) -> None:
    model = backbones.build(backbone)
    one, other = method(model), (method if beside == "itself" else LoraModel)(model)
    randomise(one, 1), randomise(other, 2)
    alone = {}
    for delta in (one, other, None):
        for each in (one, other):
            each.attach() if each is delta else each.detach()
        alone[delta] = backbones.run(model, backbone)
    order = [one, other, None, one][: len(alone[None])]
    with opendelta.route(model, order):
        mixed = backbones.run(model, backbone)
    for row, delta in enumerate(order):
        close(mixed[row], alone[delta][row])


@of_both
def test_gradient_checkpointing(method: type[DeltaBase]) -> None:
    model, x = random_net(0, ["linear"])
    delta = method(model, modified_modules=["first", "last"])
    delta.freeze_module()
    randomise(delta)
    grads = []
    for call in (model, lambda v: checkpoint(model, v, use_reentrant=False)):
        delta.zero_grad()
        call(x).square().sum().backward()
        grads.append([p.grad.clone() for p in delta.parameters()])
    for once, again in zip(*grads, strict=True):
        close(once, again)
