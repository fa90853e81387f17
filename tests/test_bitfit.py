"""BitFit: biases that are there, biases that are added, and what becomes of them."""

from __future__ import annotations

import backbones
import pytest
import torch
from cases import built, put, randomise
from pieces import BF16, dtypes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import opendelta
from opendelta.exceptions import InsertionError

# --- casts and shards ----------------------------------------------------------------------------


@pytest.mark.parametrize("off", ["detach", "remove"])
@pytest.mark.parametrize("backbone", ["bert", "t5"])
def test_a_backbone_cast_under_bitfit_is_cast_whole(off: str, backbone: str) -> None:
    """The biases that BitFit set aside follow a cast made meanwhile."""
    model, delta = built("BitFitModel", backbone)
    plain = backbones.build(backbone).to(BF16)
    randomise(delta)
    model.to(BF16)
    getattr(delta, off)()
    assert dtypes(model) == {BF16}
    assert torch.equal(backbones.run(model, backbone), backbones.run(plain, backbone))


def test_bitfit_follows_a_cast_made_while_detached() -> None:
    """Attached again, its biases have the dtype that the backbone got meanwhile."""
    model, delta = built("BitFitModel", "bert")
    other, _ = built("BitFitModel", "bert")
    for each in opendelta.deltas(model) + opendelta.deltas(other):
        randomise(each)
    delta.detach()
    model.to(BF16)
    delta.attach()
    assert dtypes(model) == dtypes(delta) == {BF16}
    assert torch.equal(backbones.run(model, "bert"), backbones.run(other.to(BF16), "bert"))


def test_bitfit_on_shards() -> None:
    """Sharded, its biases are the model's parameters and train; switching them is refused."""
    model = backbones.build("mlp")
    delta = put("BitFitModel", "mlp", model)
    randomise(delta)
    expected = backbones.run(model, "mlp")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        delta.freeze_module()
        for _ in range(2):
            biases = {name: id(p) for name, p in delta.named_parameters()}
            assert biases == {n: id(p) for n, p in model.named_parameters() if p.requires_grad}
            assert torch.equal(backbones.run(model, "mlp"), expected)
        with pytest.raises(InsertionError, match=r"bias of 'first|bias of 'last"):
            delta.detach()
        assert torch.equal(backbones.run(model, "mlp"), expected)
    finally:
        torch.distributed.destroy_process_group()
