"""The cached hash of a backbone: always what a full reading gives, and read once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from torch import nn

import opendelta
from opendelta import AutoDeltaModel, LoraModel, gen_model_hash
from opendelta.exceptions import BackboneMismatchWarning, ConfigError
from opendelta.mechanism.bare import Bare
from opendelta.saving import hash_cache
from opendelta.saving.hash_cache import backbone_hash
from opendelta.saving.hashing import tensor_lines

Read = list[int]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Read]:
    """The ids of the tensors that were read in full."""
    seen: Read = []

    def spy(bare: Bare) -> dict[str, str]:
        seen.append(id(bare.tensor))
        return tensor_lines(bare)

    monkeypatch.setattr(hash_cache, "tensor_lines", spy)
    yield seen


def full(backbone: nn.Module, **kwargs: Any) -> str:
    return gen_model_hash(backbone, format=2, **kwargs)


def model(kind: str = "bert") -> nn.Module:
    return backbones.build(kind)


def a_weight(backbone: nn.Module) -> nn.Parameter:
    return dict(backbone.named_parameters())["encoder.layer.1.output.dense.weight"]


def step(**options: bool) -> Callable[[nn.Module], None]:
    def change(backbone: nn.Module) -> None:
        p = a_weight(backbone)
        p.grad = torch.ones_like(p)
        torch.optim.AdamW([p], **options).step()

    return change


def load(backbone: nn.Module) -> None:
    state = {name: tensor + 1 for name, tensor in backbone.state_dict().items()}
    backbone.load_state_dict(state)


def through_numpy(backbone: nn.Module) -> None:
    a_weight(backbone).detach().numpy()[:] *= 2


def as_vector(backbone: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(backbone.parameters()).detach() * 2
    nn.utils.vector_to_parameters(vector, backbone.parameters())


def in_place(backbone: nn.Module) -> None:
    with torch.no_grad():
        a_weight(backbone)[0, 0].add_(1)


def new_storage(backbone: nn.Module) -> None:
    p = a_weight(backbone)
    p.data = p.data.clone()
    p.data[0, 0] += 1


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "one element in place": in_place,
    "load_state_dict": load,
    ".data": lambda m: a_weight(m).data.mul_(2),
    "new .data": new_storage,
    "numpy": through_numpy,
    "vector_to_parameters": as_vector,
    "fused AdamW": step(fused=True),
    "foreach AdamW": step(foreach=True),
    "AdamW": step(foreach=False),
    ".to(float64)": lambda m: m.to(torch.float64),
    "another parameter": lambda m: setattr(
        m.encoder.layer[1].output.dense, "weight", nn.Parameter(a_weight(m).detach() + 1)
    ),
    "another module": lambda m: setattr(m.encoder.layer[1].output, "dense", nn.Linear(24, 16)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[nn.Module], object]) -> None:
    backbone = model()
    first = backbone_hash(backbone)
    assert first == backbone_hash(backbone) == full(backbone)
    change(backbone)
    assert backbone_hash(backbone) == full(backbone) != first


def test_what_is_unchanged_is_read_once(read: Read) -> None:
    backbone: Any = model()
    backbone_hash(backbone)
    count = len(read)
    assert count == len(list(backbone.parameters()))
    backbone_hash(backbone)
    assert len(read) == count
    LoraModel(backbone)
    backbone_hash(backbone)
    assert len(read) == count
    in_place(backbone)
    backbone_hash(backbone)
    assert read[count:] == [id(a_weight(backbone))]
    backbone.encoder.layer[0].output.dense = nn.Linear(24, 16)
    backbone_hash(backbone)
    assert len(read) == count + 3


def test_a_tied_tensor_is_read_once(read: Read) -> None:
    backbone = model("gpt2")
    assert backbone_hash(backbone) == full(backbone)
    assert len(read) == len(set(read)) == len(list(backbone.parameters()))


def test_what_is_left_out_once_is_still_known(read: Read) -> None:
    backbone = model()
    backbone_hash(backbone)
    count = len(read)
    backbone_hash(backbone, ["encoder.layer.1.output.dense.weight"])
    backbone_hash(backbone)
    assert len(read) == count


def test_buffers_that_move_are_seen(read: Read) -> None:
    backbone = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    first = backbone_hash(backbone)
    count = len(read)
    backbone(torch.rand(4, 3))
    assert backbone_hash(backbone) == full(backbone) != first
    moved = {id(b) for b in backbone.buffers()}
    assert len(read) == count + 3 and set(read[count:]) == moved


def test_what_is_known_goes_with_the_tensors(read: Read) -> None:
    """A backbone whose tensors are replaced again and again keeps no lines of the former ones."""
    backbone = model("mlp")
    for _ in range(3):
        new_values = {name: p + 1 for name, p in backbone.state_dict().items()}
        backbone.load_state_dict(new_values, assign=True)
        backbone_hash(backbone)
    assert len(hash_cache._known[backbone]) == len(list(backbone.parameters()))


def test_a_frozen_backbone_is_saved_twice_and_loaded_ten_times_for_one_reading(
    read: Read, tmp_path: Path
) -> None:
    backbone = model()
    delta = LoraModel(backbone)
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "0")
    count = len(read)
    delta.save_finetuned(tmp_path / "1")
    for _ in range(10):
        AutoDeltaModel.from_finetuned(tmp_path / "0", backbone_model=backbone)
    assert len(read) == count == sum("lora" not in n for n, _ in backbone.named_parameters())


def test_parameters_that_trained_are_always_read(read: Read) -> None:
    backbone = model()
    delta = LoraModel(backbone)
    delta.freeze_module(exclude=["deltas", "layer.1.output"])
    delta.freeze_module()
    backbone_hash(backbone)
    count = len(read)
    backbone_hash(backbone)
    again = read[count:]
    assert id(a_weight(backbone)) in again
    assert id(backbone.embeddings.word_embeddings.weight) not in again


def between_samples() -> int:
    """Where a frozen embedding can be written to through numpy without being noticed."""
    frozen = model()
    LoraModel(frozen).freeze_module()
    backbone_hash(frozen)
    flat = frozen.embeddings.word_embeddings.weight.detach().numpy().reshape(-1)
    for place in range(len(flat)):
        flat[place] += 1
        if backbone_hash(frozen) != full(frozen):
            return place
    raise AssertionError("every write is noticed")


@pytest.mark.parametrize("copied", [False, True])
def test_parameters_that_trained_under_an_earlier_delta_are_read(copied: bool) -> None:
    backbone = model()
    delta = LoraModel(backbone)
    delta.freeze_module(exclude=["deltas", "word_embeddings"])
    if copied:
        backbone = copy.deepcopy(backbone)
        (delta,) = opendelta.deltas(backbone)
    delta.remove()
    LoraModel(backbone).freeze_module()
    backbone_hash(backbone)
    weight = backbone.embeddings.word_embeddings.weight
    weight.detach().numpy().reshape(-1)[between_samples()] += 1
    assert backbone_hash(backbone) == full(backbone)


def test_writes_between_the_samples_are_missed_and_full_finds_them(tmp_path: Path) -> None:
    backbone = backbones.build("bert")
    big = nn.Sequential(backbone, nn.Linear(64, 64, bias=False))
    delta = LoraModel(big, modified_modules=["query"])
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    big[1].weight.detach().numpy()[0, 0] += 1
    assert backbone_hash(big) != full(big)
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=big)
    with pytest.warns(BackboneMismatchWarning):
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=big, check_hash="full")
    with pytest.raises(ConfigError, match="check_hash='ful'"):
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=big, check_hash="ful")


def test_inference_tensors_are_always_read(read: Read) -> None:
    with torch.inference_mode():
        backbone = model()
    backbone_hash(backbone)
    count = len(read)
    assert backbone_hash(backbone) == full(backbone)
    assert len(read) == 2 * count


def test_a_copy_and_a_backbone_of_its_address_start_anew(read: Read) -> None:
    backbone = model()
    first = backbone_hash(backbone)
    twin = copy.deepcopy(backbone)
    in_place(twin)
    assert backbone_hash(twin) != first
    for _ in range(5):
        del backbone
        backbone = model()
        in_place(backbone)
        assert backbone_hash(backbone) == full(backbone) != first


def test_exclusions_have_hashes_of_their_own() -> None:
    backbone = model()
    name = "encoder.layer.1.output.dense.weight"
    without = backbone_hash(backbone, [name])
    assert without == full(backbone, excludes=[name]) != backbone_hash(backbone)
    in_place(backbone)
    assert backbone_hash(backbone, [name]) == without


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    backbone = model().to(dtype)
    assert backbone_hash(backbone) == full(backbone) == backbone_hash(backbone)
    a_weight(backbone).data.mul_(2)
    assert backbone_hash(backbone) == full(backbone)
