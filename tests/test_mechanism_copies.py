"""Copies of a backbone with deltas: deep copies, pickles, replicas, and what keeps them alive."""

from __future__ import annotations

import copy
import gc
import weakref

import backbones
import pytest
import torch
from cases import METHODS, built, output, randomise
from pieces import replicate

import opendelta

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
