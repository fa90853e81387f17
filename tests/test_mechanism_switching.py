"""Attaching, detaching, removing: what acts afterwards, and what is left as it was."""

from __future__ import annotations

from pathlib import Path

import backbones
import pytest
import torch
from cases import built, randomise
from pieces import BF16, dtypes, linears, parameter_names
from placed import trainable
from torch import nn

from opendelta import AdapterModel, AutoDeltaModel, DeltaBase, LoraModel

# --- what was exchanged meanwhile ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["BitFitModel", "LoraModel"])
def test_parameters_put_in_place_by_assignment_are_the_deltas(method: str, tmp_path: Path) -> None:
    """After ``load_state_dict(assign=True)`` what is there now trains, is saved and is detached."""
    model, delta = built(method, "bert")
    bare = backbones.run(backbones.build("bert"), "bert")
    randomise(delta)
    expected = backbones.run(model, "bert")
    loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    delta.freeze_module()
    live = {id(p) for p in model.parameters()}
    assert all(id(p) in live for p in delta.parameters())
    assert trainable(model) == {name for name, _ in delta.named_parameters()}
    delta.save_finetuned(tmp_path)
    fresh = backbones.build("bert")
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert torch.equal(backbones.run(fresh, "bert"), expected)
    delta.detach()
    assert torch.equal(backbones.run(model, "bert"), bare)
    delta.attach()
    assert torch.equal(backbones.run(model, "bert"), expected)


@pytest.mark.parametrize("while_attached", [True, False])
def test_what_replaces_and_what_was_replaced_share_a_dtype(while_attached: bool) -> None:
    """A cast reaches the one that is in place; the other follows when it takes its turn."""
    model = linears(2, 4)
    delta = DeltaBase(model)
    delta.replace_module(model, "0", model[0], nn.Linear(4, 4))
    if not while_attached:
        delta.detach()
    model.to(BF16)
    x = torch.randn(2, 4, dtype=BF16)
    for switch in (delta.detach, delta.attach, delta.remove):
        switch()
        assert dtypes(model) == {BF16}
        assert model(x).dtype == BF16


@pytest.mark.parametrize("first_off", [0, 1])
def test_detach_and_attach_keep_the_order_of_parameters(first_off: int) -> None:
    """Two deltas on one module: whichever goes and comes back, parameters are as numbered."""
    model = linears(1)
    pair = [LoraModel(model, modified_modules=["0"]), AdapterModel(model, modified_modules=["0"])]
    before = parameter_names(model)
    for delta in (pair[first_off], pair[1 - first_off]):
        delta.detach()
        delta.attach()
        assert parameter_names(model) == before
    with pair[first_off].detached():
        assert parameter_names(model) != before
    assert parameter_names(model) == before
