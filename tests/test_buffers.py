"""Persistent buffers that training moves: they come with the delta, and go with it."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cases import METHODS
from safetensors.torch import load_file
from test_breaking_off import FAULTS
from torch import Tensor, nn

import opendelta
from opendelta import AutoDeltaModel, DeltaBase, LoraModel
from opendelta.exceptions import (
    CheckpointError,
    ConfigError,
    DeltaWarning,
    InsertionError,
)

# --- backbones ------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Two convolutions and their batch norms, of which the second runs twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.again = self.bn2
        self.fc = nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.bn1(self.conv1(pixel_values)).relu()
        x = self.again(self.conv2(self.bn2(x))).relu()
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_labels=4,
            layer_type="basic",
        )
    )


def regnet() -> nn.Module:
    return transformers.RegNetForImageClassification(
        transformers.RegNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, num_labels=4
        )
    )


def levit() -> nn.Module:
    """Batch norms over tokens in line, and a constant buffer beside them."""
    return transformers.LevitForImageClassification(
        transformers.LevitConfig(
            image_size=32,
            patch_size=16,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            num_labels=4,
        )
    )


MAKE: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "resnet": resnet,
    "regnet": regnet,
    "levit": levit,
}
CONVOLUTIONS = {"modified_modules": ["conv1", "conv2"]}
ON_PLAIN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(METHODS, CONVOLUTIONS),
    "CompacterModel": {**CONVOLUTIONS, "reduction_factor": 2, "hypercomplex_division": 2},
}
# Methods of attention and of tokens; IA3 finds no place to scale, Compacter no divisible width,
# and LeViT's blocks are called with what a ParallelAdapter cannot add to.
IMPOSSIBLE = {
    *((method, name) for method in ("PrefixModel", "SoftPromptModel") for name in MAKE),
    *(("IA3Model", name) for name in ("resnet", "regnet", "levit")),
    ("CompacterModel", "regnet"),
    ("ParallelAdapterModel", "levit"),
}
QUICK = {("LoraModel", name) for name in MAKE} | {(method, "plain") for method in METHODS}
PAIRS = [
    pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
    for pair in ((method, name) for method in METHODS for name in MAKE)
    if pair not in IMPOSSIBLE
]


def build(name: str = "plain") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MAKE[name]().eval()


def put(model: nn.Module, method: str = "LoraModel", name: str = "plain") -> DeltaBase:
    torch.manual_seed(1)
    delta: DeltaBase = getattr(opendelta, method)(
        model, **(ON_PLAIN[method] if name == "plain" else {})
    )
    return delta


def images(seed: int = 0, rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 32, 32, generator=generator) * (2 + seed) + 1


@torch.no_grad()
def logits(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """With all frozen: some processors add up products with a trainable weight in another order."""
    trains = [p for p in model.parameters() if p.requires_grad]
    for p in trains:
        p.requires_grad_(False)
    output = model(pixel_values=images() if x is None else x)
    for p in trains:
        p.requires_grad_(True)
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def train(model: nn.Module, seed: int = 0, steps: int = 2) -> None:
    """Some steps in train mode; then the model is in eval mode."""
    model.train()
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trains, lr=0.05) if trains else None
    for step in range(steps):
        output = model(pixel_values=images(seed + step))
        out = output if isinstance(output, Tensor) else output.logits
        if optimizer is not None:
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
    model.eval()


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The backbone's persistent buffers by name, as they stand."""
    names = {name for name, _ in build_like(model).named_buffers()}
    return {name: b.clone() for name, b in model.named_buffers() if name in names}


def build_like(model: nn.Module) -> nn.Module:
    return build(next(name for name, m in KINDS.items() if m is type(model)))


KINDS = {name: type(make()) for name, make in MAKE.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def trained(
    method: str = "LoraModel", name: str = "plain", seed: int = 0
) -> tuple[nn.Module, DeltaBase]:
    model = build(name)
    delta = put(model, method, name)
    delta.freeze_module()
    train(model, seed)
    return model, delta


def restored(folder: Path, model: nn.Module) -> DeltaBase:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoDeltaModel.from_finetuned(folder, backbone_model=model)  # type: ignore[no-any-return]


# --- one delta ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_it_comes_back_and_goes(method: str, name: str, tmp_path: Path) -> None:
    """Detached, removed: the bare model, bit for bit. Attached, loaded: the trained one."""
    bare = build(name)
    output, values = logits(bare), buffers(bare)
    model, delta = trained(method, name)
    learnt, moved = logits(model), buffers(model)
    assert not equal(moved, values)
    delta.save_finetuned(tmp_path)
    for _ in range(2):
        delta.detach()
        assert torch.equal(logits(model), output) and equal(buffers(model), values)
        delta.attach()
        assert torch.equal(logits(model), learnt) and equal(buffers(model), moved)

    other = build(name)
    loaded = restored(tmp_path, other)
    assert torch.equal(logits(other), learnt) and equal(buffers(other), moved)
    loaded.detach()
    assert torch.equal(logits(other), output) and equal(buffers(other), values)
    with loaded.attached():
        assert torch.equal(logits(other), learnt)
    assert torch.equal(logits(other), output)
    loaded.remove()
    assert torch.equal(logits(other), output) and equal(buffers(other), values)

    delta.remove()
    assert torch.equal(logits(model), output) and equal(buffers(model), values)


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_two_are_each_as_alone(method: str, name: str, tmp_path: Path) -> None:
    alone = []
    for seed in (0, 3):
        model, delta = trained(method, name, seed)
        alone.append(logits(model))
        delta.save_finetuned(tmp_path / str(seed))
    model = build(name)
    bare = logits(model)
    deltas = []
    for seed in (0, 3):
        deltas.append(restored(tmp_path / str(seed), model))
        deltas[-1].detach()
    assert not torch.equal(alone[0], alone[1])
    draw = random.Random(4)
    for _ in range(20):
        choice = draw.randrange(3)
        for number, delta in enumerate(deltas):
            (delta.attach if number == choice else delta.detach)()
        assert torch.equal(logits(model), [*alone, bare][choice])


@pytest.mark.parametrize("name", MAKE)
def test_merged_for_good_it_stays(name: str) -> None:
    model, delta = trained("LoraModel", name)
    learnt, moved = logits(model), buffers(model)
    delta.merge()
    assert equal(buffers(model), moved)
    delta.unmerge()
    assert equal(buffers(model), moved) and torch.equal(logits(model), learnt)
    delta.merge()
    delta.merge_and_remove()
    assert opendelta.deltas(model) == [] and equal(buffers(model), moved)
    torch.testing.assert_close(logits(model), learnt, rtol=1e-4, atol=1e-4)


def test_a_merged_one_that_is_removed_takes_them_along() -> None:
    values = buffers(build())
    model, delta = trained()
    delta.merge()
    delta.remove()
    assert equal(buffers(model), values)


def test_the_buffers_stay_the_same_objects() -> None:
    """DistributedDataParallel and others hold on to them."""
    model, delta = trained()
    held = dict(model.named_buffers())
    delta.detach()
    delta.attach()
    assert all(held[name] is buffer for name, buffer in model.named_buffers())


def test_nobodys_copy_moves_along() -> None:
    """What is kept aside is not what a batch norm writes into."""
    model, delta = trained()
    moved = buffers(model)
    delta.detach()
    train(model, seed=5)  # the bare model: its own statistics move
    own = buffers(model)
    delta.attach()
    assert equal(buffers(model), moved)
    train(model, seed=7)
    again = buffers(model)
    delta.detach()
    assert equal(buffers(model), own)
    delta.attach()
    assert equal(buffers(model), again) and not equal(again, moved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_keep_all_of_it(copied: Callable[[Any], Any]) -> None:
    output = logits(build())
    model, delta = trained()
    learnt = logits(model)
    twin = copied(model)
    (theirs,) = opendelta.deltas(twin)
    theirs.detach()
    assert torch.equal(logits(twin), output) and torch.equal(logits(model), learnt)
    theirs.attach()
    assert torch.equal(logits(twin), learnt)
    train(twin, seed=5)
    delta.detach()
    delta.attach()
    assert torch.equal(logits(model), learnt)


def test_the_file_names_what_moved_and_the_hash_leaves_it_out(tmp_path: Path) -> None:
    _, delta = trained()
    delta.save_finetuned(tmp_path)
    own = {f"bn{n}.{key}" for n in (1, 2) for key in dict(nn.BatchNorm2d(1).named_buffers())}
    written = set(load_file(tmp_path / "model.safetensors"))
    assert {name for name in written if "lora" not in name} == own  # once, under the first name
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["backbone_hash_excludes"]) == own


def test_tied_buffers_are_one(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = build()
        model.bn2.running_mean = model.bn1.running_mean
        return model.eval()

    output = logits(tied())
    model = tied()
    delta = put(model)
    delta.freeze_module()
    train(model)
    learnt = logits(model)
    delta.save_finetuned(tmp_path)
    assert "bn2.running_mean" not in load_file(tmp_path / "model.safetensors")
    delta.detach()
    assert torch.equal(logits(model), output)
    other = tied()
    restored(tmp_path, other)
    assert torch.equal(logits(other), learnt)
    assert other.bn2.running_mean is other.bn1.running_mean


def test_what_did_not_move_is_not_saved(tmp_path: Path) -> None:
    model = build()
    delta = put(model)
    delta.freeze_module()
    logits(model)
    assert all("lora" in name for name in delta.checkpoint_tensors())
    model.train()
    model.bn1.eval()
    model(pixel_values=images())
    moved = {name for name in delta.checkpoint_tensors() if "lora" not in name}
    assert moved == {"bn2.running_mean", "bn2.running_var", "bn2.num_batches_tracked"}


def test_it_follows_its_backbone_into_another_dtype() -> None:
    model, delta = trained()
    moved, own = buffers(model), buffers(build())
    delta.detach()
    model.double()
    delta.attach()
    assert all(torch.equal(b, moved[n].to(b.dtype)) for n, b in buffers(model).items())
    delta.detach()
    assert all(torch.equal(b, own[n].to(b.dtype)) for n, b in buffers(model).items())


def test_switched_under_inference_mode_it_still_trains() -> None:
    model, delta = trained()
    moved = buffers(model)
    with torch.inference_mode():
        delta.detach()
        delta.attach()
    train(model, seed=3)
    delta.detach()
    delta.attach()
    assert not equal(buffers(model), moved)


def test_a_forward_that_is_alive_has_its_backward() -> None:
    """As where a reference runs without the delta between a forward and its backward."""
    gradients = []
    for switches in (False, True):
        model, delta = trained()
        out = model(pixel_values=images())
        if switches:
            with torch.no_grad(), delta.detached():
                model(pixel_values=images(2))
        out.square().mean().backward()
        gradients.append([p.grad for p in delta.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_compiled_it_follows() -> None:
    model, delta = trained()
    output, learnt = logits(build()), logits(model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        delta.detach()
        assert torch.equal(logits(compiled), output)
        delta.attach()
        assert torch.equal(logits(compiled), learnt)


def test_a_number_that_is_none_has_not_moved() -> None:
    model = build()
    model.bn1.running_mean[0] = torch.nan
    delta = put(model)
    delta.freeze_module()
    assert all("lora" in name for name in delta.checkpoint_tensors())


# --- whose it is ----------------------------------------------------------------------------------


def test_what_moves_before_the_first_freeze_is_the_backbones() -> None:
    model = build()
    delta = put(model)
    train(model)
    noted = buffers(model)
    delta.freeze_module()
    assert all("lora" in name for name in delta.checkpoint_tensors())
    train(model, seed=3)
    delta.detach()
    assert equal(buffers(model), noted)


def test_never_frozen_it_is_noted_at_construction() -> None:
    model = build()
    noted = buffers(model)
    delta = put(model)
    train(model)
    moved = buffers(model)
    delta.detach()
    assert equal(buffers(model), noted)
    delta.attach()
    assert equal(buffers(model), moved)


def test_a_loaded_one_that_trains_on_keeps_the_bare_ones(tmp_path: Path) -> None:
    trained()[1].save_finetuned(tmp_path)
    model = build()
    values = buffers(model)
    delta = restored(tmp_path, model)
    loaded = buffers(model)
    train(model, seed=2)  # before it is frozen, too
    delta.freeze_module()
    train(model, seed=3)
    moved = buffers(model)
    assert not equal(moved, loaded)
    delta.detach()
    assert equal(buffers(model), values)
    delta.attach()
    assert equal(buffers(model), moved)


def two() -> tuple[nn.Module, DeltaBase, DeltaBase]:
    model = build()
    first, second = put(model), put(model, "BitFitModel")
    return model, first, second


def test_deltas_that_train_together_all_have_it() -> None:
    model, first, second = two()
    first.freeze_module()
    train(model)
    moved = buffers(model)
    for one, other in ((first, second), (second, first)):
        one.detach()
        assert equal(buffers(model), moved)
        other.detach()
        assert equal(buffers(model), buffers(build()))
        one.attach()
        assert equal(buffers(model), moved)
        other.attach()
    second.detach()
    train(model, seed=3)  # from here on it is the first one's alone
    alone = buffers(model)
    first.detach()
    second.attach()
    assert equal(buffers(model), moved) and not equal(alone, moved)


def test_one_that_is_frozen_has_nothing_of_it() -> None:
    model, first, second = two()
    values = buffers(model)
    first.freeze_module(exclude=[first])  # the second one acts, and was inserted last
    train(model)
    moved = buffers(model)
    assert "bn1.running_mean" not in second.checkpoint_tensors()
    first.detach()
    assert equal(buffers(model), values)
    second.detach()
    first.attach()
    assert equal(buffers(model), moved)


def test_one_that_leaves_a_part_of_the_backbone_trainable_has_it() -> None:
    model, first, second = two()
    with pytest.warns(DeltaWarning, match="All deltas are frozen"):
        first.freeze_module(exclude=["fc"])
    train(model)
    assert "bn1.running_mean" in first.checkpoint_tensors()
    assert "bn1.running_mean" not in second.checkpoint_tensors()


def test_of_several_that_moved_it_the_last_inserted_stands(tmp_path: Path) -> None:
    files = []
    for seed in (0, 3):
        model, delta = trained(seed=seed)
        files.append(buffers(model))
        delta.save_finetuned(tmp_path / str(seed))
    model = build()
    first, second = (restored(tmp_path / str(seed), model) for seed in (0, 3))
    for _ in range(2):
        assert equal(buffers(model), files[1])
        second.detach()
        assert equal(buffers(model), files[0])
        second.attach()
    first.detach()
    first.attach()  # in its old place among the others
    assert equal(buffers(model), files[1])
    second.remove()
    assert equal(buffers(model), files[0])


def test_a_part_that_stays_attached_keeps_it() -> None:
    model, delta = trained()
    moved = buffers(model)
    delta.detach(model.conv1)
    assert equal(buffers(model), moved)
    delta.detach(model.conv2)
    assert equal(buffers(model), buffers(build()))
    delta.attach(model.conv1)
    assert equal(buffers(model), moved)


def test_new_modules_are_the_backbones_as_they_are() -> None:
    model = build()
    delta = put(model)
    model.fc = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))
    delta.freeze_module()
    train(model)
    moved = model.fc[0].running_mean.clone()
    assert torch.equal(delta.checkpoint_tensors()["fc.0.running_mean"], moved)
    delta.detach()
    assert not model.fc[0].running_mean.any()
    delta.attach()
    assert torch.equal(model.fc[0].running_mean, moved)


def test_buffers_of_a_delta_module_are_not_the_backbones() -> None:
    class Normed(DeltaBase):
        delta_type = "normed"
        default_modified_modules: list[str] = []

        def __init__(self, backbone_model: nn.Module, modified_modules: Any = None) -> None:
            self._construct()

        def update_module(self, module: nn.Module, key: str) -> None:
            host = module.get_submodule(key)
            self.insert_sequential_module(host, nn.BatchNorm2d(8), delta_name="norm")

    model = build()
    output = logits(model)
    delta = Normed(model, ["conv1"])
    delta.freeze_module()
    train(model)
    assert "conv1.norm.running_mean" in delta.checkpoint_tensors()
    norm = model.conv1.norm
    theirs = norm.running_mean.clone()
    delta.detach()
    assert torch.equal(logits(model), output) and torch.equal(norm.running_mean, theirs)
    delta.attach()
    assert torch.equal(model.conv1.norm.running_mean, theirs)


# --- large ones -----------------------------------------------------------------------------------


class Queue(nn.Module):
    """A buffer of 17 MiB into which training writes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("queue", torch.zeros(17 << 18))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            self.queue.data[-16:] = x.detach().flatten()[:16]
        out: Tensor = x + self.queue[-1]
        return out


def test_a_large_one_is_told_once_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Queue(), torch.randn(4, 4)
    start = copy.deepcopy(model)
    delta = LoraModel(model, modified_modules=["linear"], lora_r=2)
    delta.freeze_module()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.detach()
        delta.attach()
    model.train()(x)
    with pytest.warns(DeltaWarning, match="'queue'.*17 MiB"):
        delta.save_finetuned(tmp_path)
    learnt = model.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.detach()
        delta.attach()
    loaded = restored(tmp_path, start)
    assert torch.equal(start.eval()(x), learnt)
    loaded.detach()
    assert not start.queue.any()


def test_the_backbones_own_movement_of_a_large_one_is_not_told() -> None:
    model = Queue()
    delta = LoraModel(model, modified_modules=["linear"], lora_r=2)
    delta.freeze_module()
    delta.detach()
    model.train()(torch.randn(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.attach()
        delta.detach()


# --- state dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_the_trimmed_state_dict_has_them(name: str) -> None:
    model, _ = trained("LoraModel", name)
    learnt, held = logits(model), model.state_dict()
    values = buffers(build(name))
    changed = {n for n, b in buffers(model).items() if not torch.equal(b, values[n])}
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(held) == trains | changed and changed
    stream = io.BytesIO()
    torch.save(held, stream)
    stream.seek(0)

    other = build(name)
    delta = put(other, "LoraModel", name)
    delta.freeze_module()
    other.load_state_dict(torch.load(stream), strict=True)
    assert torch.equal(logits(other), learnt)
    delta.detach()
    assert equal(buffers(other), values)


def test_a_trimmed_dict_from_before_they_moved_brings_the_own_ones_back() -> None:
    model = build()
    delta = put(model)
    delta.freeze_module()
    output, held = logits(model), copy.deepcopy(model.state_dict())
    assert all("lora" in key for key in held)
    train(model)
    model.load_state_dict(held, strict=True)
    assert torch.equal(logits(model), output)


def test_a_part_of_a_dict_leaves_them_alone() -> None:
    model, _ = trained()
    learnt, key = logits(model), next(iter(model.state_dict()))
    model.load_state_dict({key: model.state_dict()[key]}, strict=False)
    assert torch.equal(logits(model), learnt)


def test_a_submodules_trimmed_dict_has_its_own() -> None:
    model, delta = trained()
    delta.set_active_state_dict(model.bn1)
    assert set(model.bn1.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}
    delta.freeze_module(exclude=["deltas", "bn1.weight"])
    assert "weight" in model.bn1.state_dict() and "bias" not in model.bn1.state_dict()


@pytest.mark.slow
def test_the_trainer_resumes(tmp_path: Path) -> None:
    class Data(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, row: int) -> dict[str, Any]:
            return {"pixel_values": images(row, 1)[0], "labels": row % 4}

    def run(resume: bool) -> Tensor:
        model = build("resnet")
        delta = put(model, name="resnet")
        delta.freeze_module()
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            learning_rate=1e-2,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Data())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return logits(model.eval())

    assert torch.equal(run(False), run(True))


# --- bad files ------------------------------------------------------------------------------------


def test_one_of_another_size_is_refused_and_nothing_loaded(tmp_path: Path) -> None:
    trained()[1].save_finetuned(tmp_path)
    model = build()
    delta = put(model)
    before, values = logits(model), buffers(model)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bn1.running_mean"] = torch.zeros(5)
    torch.save(tensors, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"bn1.running_mean: \(5,\) in the file, \(8,\) here"):
        delta.load_checkpoint(tmp_path / "other.pt")
    assert torch.equal(logits(model), before) and equal(buffers(model), values)
    other = build()
    with pytest.raises(CheckpointError, match="bn1.running_mean"):
        AutoDeltaModel.from_finetuned(tmp_path, other, state_dict=tensors)
    assert opendelta.deltas(other) == [] and equal(buffers(other), values)


def test_weights_alone_are_loaded_whatever_the_config_knew(tmp_path: Path) -> None:
    model, delta = trained()
    learnt = logits(model)
    delta.save_checkpoint(tmp_path / "weights.safetensors")
    other = build()
    second = put(other)
    second.freeze_module()
    second.save_finetuned(tmp_path / "new")  # whose config names none
    second.detach()
    second.load_checkpoint(tmp_path / "weights.safetensors")
    assert equal(buffers(other), buffers(build()))
    second.attach()
    assert torch.equal(logits(other), learnt)


# --- PEFT -----------------------------------------------------------------------------------------


class Normed(nn.Module):
    """What PEFT puts a LoRA on without a word about it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.free = nn.BatchNorm1d(16, affine=False)
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.free(self.norm(self.body(x))))
        return out


def rows() -> Tensor:
    return torch.randn(32, 6, generator=torch.Generator().manual_seed(0)) * 4 + 2


def step(model: nn.Module, scale: float) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(rows() * scale).square().mean().backward()
        optimizer.step()
    model.eval()


def test_two_files_of_peft_with_statistics(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    expected = []
    for scale in (1.0, 3.0):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["body"], modules_to_save=["norm"])
        theirs = peft.get_peft_model(Normed(), config)
        step(theirs, scale)
        theirs.save_pretrained(tmp_path / str(scale))
        again = peft.PeftModel.from_pretrained(Normed(), tmp_path / str(scale)).eval()
        expected.append(again(rows()))
    model = Normed().eval()
    for scale, want in zip((1.0, 3.0), expected, strict=True):
        delta = AutoDeltaModel.from_peft(tmp_path / str(scale), model)
        torch.testing.assert_close(model(rows()), want, rtol=1e-6, atol=1e-6)
        delta.detach()
        assert not model.norm.running_mean.any()
    for delta, want in zip(opendelta.deltas(model), expected, strict=True):
        with delta.attached():
            torch.testing.assert_close(model(rows()), want, rtol=1e-6, atol=1e-6)
    assert not torch.equal(expected[0], expected[1])
    first, _ = opendelta.deltas(model)
    first.attach()
    again = AutoDeltaModel.from_peft(tmp_path / "1.0", model)  # whose statistics stand there now
    first.remove()
    torch.testing.assert_close(model(rows()), expected[0], rtol=1e-6, atol=1e-6)
    assert again.is_attached


def test_peft_reads_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = Normed()
    delta = LoraModel(model, modified_modules=["body"], lora_r=4)
    delta.freeze_module(exclude=["deltas", "head"])
    step(model, 1.0)
    delta.export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Normed(), tmp_path).eval()
    torch.testing.assert_close(theirs(rows()), model(rows()), rtol=1e-6, atol=1e-6)
    back = Normed()
    loaded = AutoDeltaModel.from_peft(tmp_path, back)
    assert not any("running" in pattern for pattern in loaded.unfrozen_modules)
    torch.testing.assert_close(back(rows()), model(rows()), rtol=1e-6, atol=1e-6)


# --- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_a_route_runs_each_row_with_its_own(name: str, tmp_path: Path) -> None:
    for seed in (0, 3):
        trained("LoraModel", name, seed)[1].save_finetuned(tmp_path / str(seed))
    model = build(name)
    first, second = (restored(tmp_path / str(seed), model) for seed in (0, 3))
    x = images()
    alone = {}
    for delta in (first, second, None):
        first.detach()
        second.detach()
        if delta is not None:
            delta.attach()
        alone[delta] = logits(model, x)
    first.attach()
    standing = buffers(model)
    lists = [
        [first, second, None, first, None, second],
        [first] * 6,
        [None] * 6,
        [second, None, None, None, None, None],
    ]
    for entries in lists:
        with opendelta.route(model, entries):
            routed = logits(model, x)
            inner = {}
            for asked in ([second, first, None] * 2, [second] * 6, [None] * 6):
                with opendelta.route(model, asked):
                    inner[tuple(asked)] = logits(model, x)
        for asked, got in ((tuple(entries), routed), *inner.items()):
            want = torch.stack([alone[delta][row] for row, delta in enumerate(asked)])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert equal(buffers(model), standing)


def test_a_route_of_different_ones_is_refused_in_training(tmp_path: Path) -> None:
    trained()[1].save_finetuned(tmp_path)
    model = build()
    first, second = restored(tmp_path, model), put(model)
    before = buffers(model)
    model.train()
    refused = pytest.raises(InsertionError, match="'bn1'.*BatchNorm2d.*eval")
    with opendelta.route(model, [first, second] * 3), refused:
        model(pixel_values=images())
    second.detach()
    first.attach()
    assert equal(buffers(model), before)


def test_a_route_in_training_gives_movement_to_those_it_names() -> None:
    model = build()
    first, second, third = put(model), put(model), put(model)
    values = buffers(model)
    first.freeze_module()
    second.detach()
    model.train()
    for _ in range(2):
        with opendelta.route(model, [first, second] * 3):
            model(pixel_values=images())
    moved = buffers(model)
    third.detach()
    first.detach()
    assert equal(buffers(model), values)
    for delta in (first, second):
        with delta.attached():
            assert equal(buffers(model), moved)
    with third.attached():
        assert equal(buffers(model), values)
    assert not equal(moved, values)


def test_a_route_refuses_a_module_with_others_inside() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.count.add_(1)
            out: Tensor = self.body(x) + self.count
            return out

    model = Outer()
    delta = LoraModel(model, modified_modules=["body"])
    delta.freeze_module()
    model.train()(torch.zeros(2, 4))
    model.eval()
    with pytest.raises(InsertionError, match="'count'"), opendelta.route(model, [delta, None]):
        pass
    with opendelta.route(model, [delta, delta]):
        model(torch.zeros(2, 4))


def test_a_sum_has_those_of_the_one_that_moved_any() -> None:
    model, first = trained()
    moved = buffers(model)
    second = put(model)
    third = opendelta.combine([first, second], weights=[1.0, 0.5])
    first.detach()
    second.detach()
    assert equal(buffers(model), buffers(build()))
    third.attach()
    assert equal(buffers(model), moved)
    with pytest.raises(ConfigError, match="'bn1.running_mean'"):
        opendelta.combine([first, third], weights=[1.0, 1.0])


# --- wholly or not --------------------------------------------------------------------------------


def moving() -> tuple[nn.Module, DeltaBase]:
    """A trained delta whose movement nobody has looked at yet."""
    return trained()


def off() -> tuple[nn.Module, DeltaBase]:
    model, delta = trained()
    delta.detach()
    return model, delta


def in_route(model: nn.Module, delta: DeltaBase) -> None:
    with opendelta.route(model, [delta, None]):
        logits(model, images(rows=2))


ACTS: dict[str, tuple[Any, Callable[[nn.Module, DeltaBase], Any]]] = {
    "detach": (moving, lambda m, d: d.detach()),
    "attach": (off, lambda m, d: d.attach()),
    "remove": (moving, lambda m, d: d.remove()),
    "route": (moving, in_route),
    "a second": (off, lambda m, d: put(m, "BitFitModel")),
    "load": (off, lambda m, d: d.load_checkpoint(SAVED[0])),
}
SAVED: list[Path] = []


@FAULTS
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "detach")) for kind in ACTS]
)
def test_wholly_before_or_wholly_after(kind: str, fault: Any, tmp_path: Path) -> None:
    trained(seed=3)[1].save_finetuned(tmp_path)
    SAVED[:] = [tmp_path]
    setup, act = ACTS[kind]

    def seen(model: nn.Module) -> list[Any]:
        """What stands, and what stands with nothing, and with each delta alone."""
        now, there = [buffers(model), logits(model)], opendelta.deltas(model)
        attached = [delta.is_attached for delta in there]
        for delta in there:
            delta.detach()
        now += [buffers(model), logits(model)]
        for delta in there:
            with delta.attached():
                now += [buffers(model), logits(model)]
        return [[n.tolist() if isinstance(n, Tensor) else str(n) for n in now], attached]

    made = setup()
    before = seen(made[0])
    made = setup()
    act(*made)
    after = seen(made[0])
    made = setup()
    with fault(0) as counted:
        act(*made)
    count = len(counted.seen)
    assert count > 1
    for at in range(1, count + 1, max(1, count // 12)):
        model, delta = setup()
        try:
            with fault(at) as broken:
                act(model, delta)
        except (KeyboardInterrupt, torch.OutOfMemoryError, opendelta.OpenDeltaError):
            pass
        assert seen(model) in (before, after), broken.where
