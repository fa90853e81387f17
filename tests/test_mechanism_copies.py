"""Copies of a backbone with deltas: deep copies, pickles, replicas, and what keeps them alive."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import backbones
import pytest
import torch
from cases import METHODS, built, output, randomise
from pieces import replicate
from placed import PLACED_METHODS, place
from torch import nn

import opendelta

# --- deltas(backbone) ----------------------------------------------------------------------------


each_method = pytest.mark.parametrize("method", PLACED_METHODS)


def test_deltas_of_a_backbone_in_order() -> None:
    model = backbones.build("bert_cls")
    assert opendelta.deltas(model) == []
    made = []
    for method in PLACED_METHODS:
        made.append(place(method, "bert_cls", model))
        assert opendelta.deltas(model) == made
    made[2].detach()
    assert opendelta.deltas(model) == made
    made.pop(2).remove()
    assert opendelta.deltas(model) == made
    assert opendelta.deltas(nn.ModuleDict({"inner": model})) == made
    assert opendelta.deltas(backbones.build("bert_cls")) == []


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    found: nn.Module = torch.load(buffer, weights_only=False)
    return found


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@each_method
def test_deltas_of_a_copy_are_its_own(method: str, copied: Any) -> None:
    model = backbones.build("bert_cls")
    first, second = place(method, "bert_cls", model), place("LoraModel", "bert_cls", model)
    randomise(first)
    twin = copied(model)
    found = opendelta.deltas(twin)
    assert [type(delta) for delta in found] == [type(first), type(second)]
    assert not set(found) & {first, second}
    assert all(delta.backbone_model is twin for delta in found)
    both = backbones.run(model, "bert_cls")
    found[0].detach()
    assert torch.equal(backbones.run(model, "bert_cls"), both)
    first.detach()
    assert torch.equal(backbones.run(twin, "bert_cls"), backbones.run(model, "bert_cls"))


# --- replicas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_replica_computes_what_the_model_does(method: str) -> None:
    """On DataParallel's replicas too, BitFit's bias of T5's norm and Compacter's rule included."""
    model, delta = built(method, "t5")
    bare = backbones.run(backbones.build("t5"), "t5")
    randomise(delta)
    expected = backbones.run(model, "t5")
    assert not torch.equal(expected, bare)
    assert torch.equal(backbones.run(replicate(model), "t5"), expected)


# --- life and death ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_nothing_keeps_a_model_or_its_delta_alive(method: str) -> None:
    """Let go of, they are freed; a delta that was removed is freed before its backbone."""
    model, delta = built(method, "bert")
    delta.freeze_module()
    output(model, "bert").sum().backward()
    refs = [weakref.ref(model), weakref.ref(delta)]
    twin = copy.deepcopy(model)
    del model, delta
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    (left,) = opendelta.deltas(twin)
    removed = weakref.ref(left)
    left.remove()
    del left
    gc.collect()
    assert removed() is None
    backbones.run(twin, "bert")
