"""Small promises that are easily broken while something else is changed."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import METHODS, built, loss, output, put, randomise
from placed import trainable, unchanged
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    BaseDeltaConfig,
    BitFitModel,
    CompacterModel,
    DeltaBase,
    LoraConfig,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
    gen_model_hash,
)
from opendelta.exceptions import (
    AddressingError,
    CheckpointError,
    ConfigError,
    InsertionError,
    UnknownArgumentError,
)

BF16 = torch.bfloat16


def dtypes(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters()}


def linears(count: int = 2, width: int = 8) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- dropout -------------------------------------------------------------------------------------


def test_dropout_is_the_same_with_and_without_checkpointing() -> None:
    """One seed, one mask: a recomputed block drops what its first forward dropped."""
    model, delta = built("LoraModel", "bert", lora_dropout=0.3)
    randomise(delta)
    delta.freeze_module()
    model.train()
    seen: list[tuple[float, Tensor]] = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        model.zero_grad()
        value = loss(model, "bert")
        value.backward()
        grads = [p.grad.flatten() for p in delta.parameters() if p.grad is not None]
        seen.append((value.item(), torch.cat(grads)))
    (plain, grad), *others = seen
    assert len(grad) == sum(p.numel() for p in delta.parameters())
    assert grad.abs().sum() > 0
    for value, other in others:
        assert value == plain
        assert torch.equal(other, grad)


def test_dropout_is_the_same_with_and_without_gradients() -> None:
    """Whether gradients are wanted does not change what a seed drops."""
    model = linears(1)
    delta = LoraModel(model, modified_modules=["0"], lora_dropout=0.5)
    randomise(delta)
    model.train()
    x = torch.randn(3, 8)
    outputs = []
    for enabled in (True, False):
        torch.manual_seed(7)
        with torch.set_grad_enabled(enabled):
            outputs.append(model(x))
    assert torch.equal(*outputs)
    delta.eval()
    assert not torch.equal(outputs[0], model(x))


# --- dtypes, and tensors that are exchanged ------------------------------------------------------


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


def test_another_deltas_freeze_sees_assigned_biases_too() -> None:
    """Whichever delta freezes, biases that were assigned remain BitFit's."""
    model, bitfit = built("BitFitModel", "bert")
    lora = LoraModel(model)
    loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    lora.freeze_module()
    both = {name for delta in (bitfit, lora) for name, _ in delta.named_parameters()}
    assert trainable(model) == both
    lora.freeze_module(exclude=["deltas", "bias"])
    assert not set(lora.left_trainable or ()) & {name for name, _ in bitfit.named_parameters()}


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


class Quantised(nn.Module):
    """A linear whose weight is stored in 8 bits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = self.out_features = 16
        self.weight = nn.Parameter(torch.ones(16, 16).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).t()


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("computed", [torch.float32, BF16])
@pytest.mark.parametrize("method", [LoraModel, AdapterModel])
def test_a_delta_on_quantised_weights_computes_as_the_backbone_does(
    method: Callable[..., DeltaBase], stored: torch.dtype, computed: torch.dtype
) -> None:
    """The 8 bits are how the weight is stored: the delta has the dtype of the rest and trains."""
    model = nn.Sequential(Quantised(stored), nn.Linear(16, 16).to(computed))
    delta = method(model, modified_modules=["0"])
    assert dtypes(delta) == {computed}
    randomise(delta)
    model(torch.randn(2, 16, dtype=computed)).sum().backward()
    assert all(p.grad is not None for p in delta.parameters())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_in_half_precision_keeps_no_second_input(dropout: float, autocast: bool) -> None:
    """For backward it keeps the input that there is, no cast or dropped copy of that size."""
    model = linears(1, 64)
    if not autocast:
        model.to(BF16)
    delta = LoraModel(model, modified_modules=["0"], lora_dropout=dropout)
    delta.freeze_module()
    model.train()
    x = torch.randn(64, 64, 64, dtype=BF16, requires_grad=True)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with (
        torch.autocast("cpu", BF16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        model(x)
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() >= x.numel() // 2}
    assert large == {x.untyped_storage().data_ptr()}


def test_nothing_is_loaded_onto_a_backbone_without_storage(tmp_path: Path) -> None:
    """On the meta device weights would vanish: loading says so and puts nothing on."""
    source, delta = built("LoraModel", "bert")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    with torch.device("meta"):
        empty = type(source)(source.config)
    before = names(empty)
    for check_hash in (True, False):
        with pytest.raises(CheckpointError, match="meta"):
            LoraModel.from_finetuned(tmp_path, backbone_model=empty, check_hash=check_hash)
        assert names(empty) == before
        assert opendelta.deltas(empty) == []


# --- replicas, threads, compiled models ----------------------------------------------------------


def replicate(model: nn.Module) -> nn.Module:
    """What `nn.parallel.replicate` makes: parameters of a copy are plain attributes."""
    modules = list(model.modules())
    copies = [module._replicate_for_data_parallel() for module in modules]
    index = {id(module): i for i, module in enumerate(modules)}
    for module, twin in zip(modules, copies, strict=True):
        twin._former_parameters = {}
        for key, child in module._modules.items():
            if child is None:
                twin._modules[key] = None
            else:
                setattr(twin, key, copies[index[id(child)]])
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                if tensor is None:
                    getattr(twin, kind)[key] = None
                else:
                    setattr(twin, key, tensor.detach() * 1)
    return copies[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_replica_computes_what_the_model_does(method: str) -> None:
    """On DataParallel's replicas too, BitFit's bias of T5's norm and Compacter's rule included."""
    model, delta = built(method, "t5")
    bare = backbones.run(backbones.build("t5"), "t5")
    randomise(delta)
    expected = backbones.run(model, "t5")
    assert not torch.equal(expected, bare)
    assert torch.equal(backbones.run(replicate(model), "t5"), expected)


def test_hashing_does_not_disturb_a_running_model() -> None:
    """The hash of a model that another thread runs: the deltas stay where they are meanwhile."""
    model, delta = built("LoraModel", "bert")
    randomise(delta)
    expected = backbones.run(model, "bert")
    digest = gen_model_hash(model)
    stop = threading.Event()
    digests: set[str] = set()

    def hash_on() -> None:
        while not stop.is_set():
            digests.add(gen_model_hash(model))

    thread = threading.Thread(target=hash_on)
    thread.start()
    try:
        for _ in range(60):
            assert torch.equal(backbones.run(model, "bert"), expected)
    finally:
        stop.set()
        thread.join()
    assert digests == {digest}


def test_a_parallel_adapter_serves_several_threads() -> None:
    """What one thread's forward holds back is not taken up by another's."""
    model, delta = built("ParallelAdapterModel", "bert")
    randomise(delta)
    batches = [torch.randint(1, 128, (4, 16)) for _ in range(4)]
    with torch.no_grad():
        expected = [model(ids)[0] for ids in batches]
    wrong: list[int] = []

    def run(k: int) -> None:
        with torch.no_grad():
            for _ in range(15):
                try:
                    right = torch.equal(model(batches[k])[0], expected[k])
                except Exception:
                    wrong.append(k)
                    raise
                if not right:
                    wrong.append(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_torch_compile_returns_stands_for_the_model(tmp_path: Path) -> None:
    """Wherever a module of the backbone is asked for, the compiled one will do."""
    model = backbones.build("mlp")
    compiled = torch.compile(model, backend="eager")
    delta = LoraModel(compiled, modified_modules=["first"])
    randomise(delta)
    expected = backbones.run(model, "mlp")
    delta.freeze_module(module=compiled)
    assert trainable(model) == set(model.state_dict()) == {f"first.lora.lora_{x}" for x in "AB"}
    delta.set_active_state_dict(compiled)
    delta.save_checkpoint(tmp_path / "w.safetensors", backbone_model=compiled)
    delta.detach(module=compiled)
    assert not delta.is_attached
    delta.attach(module=compiled)
    delta.load_checkpoint(tmp_path / "w.safetensors", backbone_model=compiled)
    assert torch.equal(backbones.run(model, "mlp"), expected)
    assert gen_model_hash(compiled) == gen_model_hash(backbones.build("mlp"))


# --- order and modes of what is there ------------------------------------------------------------


def test_hashing_changes_neither_the_deltas_mode_nor_any_order() -> None:
    """A hash only looks: ``delta.eval()`` holds, and parameters keep the order of optimizers."""
    model = linears(1)
    delta = LoraModel(model, modified_modules=["0"], lora_dropout=0.1)
    model[0].extra = nn.Linear(2, 2)
    model.train()
    delta.eval()
    before = names(model)
    gen_model_hash(model)
    assert names(model) == before
    assert not any(module.training for module in delta.modules())


@pytest.mark.parametrize("first_off", [0, 1])
def test_detach_and_attach_keep_the_order_of_parameters(first_off: int) -> None:
    """Two deltas on one module: whichever goes and comes back, parameters are as numbered."""
    model = linears(1)
    pair = [LoraModel(model, modified_modules=["0"]), AdapterModel(model, modified_modules=["0"])]
    before = names(model)
    for delta in (pair[first_off], pair[1 - first_off]):
        delta.detach()
        delta.attach()
        assert names(model) == before
    with pair[first_off].detached():
        assert names(model) != before
    assert names(model) == before


@pytest.mark.parametrize("method", [LoraModel, AdapterModel])
def test_hidden_states_are_those_with_the_delta(method: Callable[..., DeltaBase]) -> None:
    """``output_hidden_states`` shows the same whether or not it was asked for before."""
    seen = []
    for ran_before in (True, False):
        model = backbones.build("bert")
        inputs = backbones.inputs("bert")
        with torch.no_grad():
            if ran_before:
                model(**inputs, output_hidden_states=True)
            randomise(method(model, modified_modules=["[r]encoder\\.layer\\.\\d+$"]))
            seen.append(model(**inputs, output_hidden_states=True))
    for one, other in zip(seen[0].hidden_states, seen[1].hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(seen[0].hidden_states[-1], seen[0].last_hidden_state)


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_a_pair_is_detached_with_the_other_half(half: int) -> None:
    """A ParallelAdapter acts on both its modules or on none of them."""
    model = backbones.build("mlp")
    bare = backbones.run(model, "mlp")
    delta = put("ParallelAdapterModel", "mlp", model)
    randomise(delta)
    expected = backbones.run(model, "mlp")
    host = model.get_submodule(["first", "last.1"][half])
    delta.detach(module=host)
    assert torch.equal(backbones.run(model, "mlp"), bare)
    delta.attach(module=host)
    assert torch.equal(backbones.run(model, "mlp"), expected)


# --- parts and wholes ----------------------------------------------------------------------------


def part_and_whole() -> tuple[nn.Module, DeltaBase, DeltaBase]:
    """A backbone, an adapter put on its encoder, and LoRA put on the whole."""
    model = backbones.build("bert")
    adapter = AdapterModel(model.encoder, modified_modules=["output.dense"])
    lora = LoraModel(model, modified_modules=["query"])
    for delta in (adapter, lora):
        randomise(delta)
    return model, adapter, lora


def ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


def test_freezing_the_whole_knows_the_deltas_of_its_parts() -> None:
    """``"deltas"`` and delta objects in `exclude` reach those put on a part of the backbone."""
    model, adapter, lora = part_and_whole()
    assert set(opendelta.deltas(model)) == {adapter, lora}
    for exclude, kept in (
        (["deltas"], ids(adapter) | ids(lora)),
        ([adapter], ids(adapter)),
        ([lora], ids(lora)),
    ):
        lora.freeze_module(exclude=exclude)
        assert {id(p) for p in model.parameters() if p.requires_grad} == kept
        assert lora.left_trainable == []
    lora.freeze_module(exclude=["deltas", "pooler"])
    assert lora.left_trainable == ["pooler.dense.weight", "pooler.dense.bias"]


def test_a_delta_of_the_whole_is_saved_without_those_of_parts(tmp_path: Path) -> None:
    """Its file holds it and the backbone's own, and is known to fit a fresh backbone."""
    _, adapter, lora = part_and_whole()
    lora.freeze_module(exclude=["deltas", "encoder"])
    lora.save_finetuned(tmp_path)
    held = set(load_file(tmp_path / "model.safetensors"))
    assert not any("adapter" in name for name in held)
    fresh = backbones.build("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel.from_finetuned(tmp_path, backbone_model=fresh)
    adapter.detach()
    assert torch.equal(backbones.run(fresh, "bert"), backbones.run(lora.backbone_model, "bert"))


def test_a_model_with_a_frozen_part_takes_its_own_state_dict() -> None:
    """``load_state_dict(state_dict())`` works though one part's entries are left out."""
    model, adapter, lora = part_and_whole()
    expected = backbones.run(model, "bert")
    adapter.freeze_module()
    whole = len(list(model.parameters()))
    assert len(model.state_dict()) < whole
    model.load_state_dict(model.state_dict())
    lora.freeze_module(module=model.embeddings)
    assert not any(name.startswith("embeddings") for name in model.state_dict())
    model.load_state_dict(model.state_dict())
    assert torch.equal(backbones.run(model, "bert"), expected)


@pytest.mark.parametrize("more", [[], ["pooler"]])
def test_a_dict_that_stays_reduced_can_be_loaded_again(more: list[str]) -> None:
    """With ``reset_state_dict=False`` a detached model still takes what it gives."""
    model, delta = built("LoraModel", "bert")
    delta.freeze_module(exclude=["deltas", *more])
    delta.detach(reset_state_dict=False)
    reduced = model.state_dict()
    assert set(reduced) == {f"{part}.dense.{p}" for part in more for p in ("weight", "bias")}
    model.load_state_dict(reduced)
    delta.attach()
    assert len(model.state_dict()) == len(reduced) + len(list(delta.parameters()))


# --- where deltas go -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (LoraModel, {}),
        (AdapterModel, {}),
        (LowRankAdapterModel, {"reduction_factor": 2}),
        (CompacterModel, {"reduction_factor": 2}),
        (ParallelAdapterModel, {"modified_modules": ["0", "0"]}),
        (BitFitModel, {}),
    ],
)
def test_one_more_module_after_construction(
    method: Callable[..., DeltaBase], arguments: dict[str, Any]
) -> None:
    """`update_module` puts the method on a further module, which is detached with the rest."""
    model = linears()
    x = torch.randn(3, 8)
    bare = model(x)
    delta = method(model, **{"modified_modules": ["0"], **arguments})
    count = len(list(delta.parameters()))
    delta.update_module(model, "1")
    assert len(list(delta.parameters())) == 2 * count
    randomise(delta)
    changed = model(x)
    delta.detach(module=model[0])
    assert not torch.equal(model(x), bare)
    delta.detach(module=model[1])
    assert torch.equal(model(x), bare)
    delta.attach()
    assert torch.equal(model(x), changed)
    delta.remove()
    assert torch.equal(model(x), bare)
    assert hooks(model) == 0


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 100


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, mask: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        y: Tensor = self.inner(hidden)
        return y if mask is None else y * mask


class Calls(nn.Module):
    """Calls `Masked` in one of several ways."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.part = Masked()

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.part, x)


@pytest.mark.parametrize(
    "call",
    [
        lambda part, x: part(mask=torch.ones(1, dtype=torch.long), hidden=x),
        lambda part, x: part(hidden=x, mask=torch.ones(1, dtype=torch.long)),
        lambda part, x: part(None, x),
        lambda part, x: part(None, hidden=x),
    ],
)
def test_before_changes_the_argument_that_it_read(call: Callable[..., Tensor]) -> None:
    """The hidden state is written back where it was found among the arguments."""
    model = Calls(call)
    x = torch.randn(2, 4)
    expected = model(x + 100)
    DeltaBase(model).insert_module(model.part, "before", Shift(), "shift")
    assert torch.equal(model(x), expected)


def test_a_module_that_is_called_with_ids_by_keyword() -> None:
    """An adapter behind the embeddings needs no float among the arguments."""
    model = backbones.build("bert")
    bare = backbones.run(model, "bert")
    randomise(AdapterModel(model, modified_modules=["embeddings"]))
    assert not torch.equal(backbones.run(model, "bert"), bare)


def test_patterns_do_not_reach_inside_what_replaced_a_module() -> None:
    """A replacement is a delta: neither other deltas nor names in `exclude` go into it."""
    model = linears()
    delta = DeltaBase(model)
    delta.replace_module(model, "0", model[0], nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    for pattern in ("0.0", "[r]0\\.\\d"):
        with pytest.raises(AddressingError):
            LoraModel(model, modified_modules=[pattern])
    lora = LoraModel(model, modified_modules=["[r]\\d"])
    assert names(lora) == ["1.lora.lora_A", "1.lora.lora_B"]


class Block(nn.Module):
    """Holds linears, and says how wide it is."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_lora_reaches_the_linears_of_a_block_that_tells_its_widths() -> None:
    """A module that holds linears stands for them, whatever attributes it has."""
    delta = LoraModel(nn.Sequential(Block()), modified_modules=["0"])
    assert names(delta) == [f"0.{part}.lora.lora_{x}" for part in ("up", "down") for x in "AB"]


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 4
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[Any, Any]:
        return {0: self.inner(x), ("a", 1): "kept"}


def test_outputs_whose_keys_are_no_strings() -> None:
    """A dict comes back as a dict with the same keys, its hidden state changed."""
    model = nn.Sequential(Keyed())
    x = torch.randn(2, 4)
    bare = model(x)
    delta = AdapterModel(model, modified_modules=["0"])
    randomise(delta)
    after = model(x)
    assert list(after) == [0, ("a", 1)]
    assert after["a", 1] == "kept"
    assert not torch.equal(after[0], bare[0])


# --- values that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank_pattern": {"query": "8"}},
        {"rank_pattern": {"query": 2.5}},
        {"rank_pattern": {"query": True}},
        {"rank_pattern": {"query": 0}},
        {"rank_pattern": {1: 2}},
        {"rank_pattern": ["query"]},
        {"alpha_pattern": {"query": float("nan")}},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"modified_modules": []},
        {"modified_modules": ()},
        {"modified_modules": [3]},
    ],
    ids=str,
)
def test_bad_values_name_the_argument(arguments: dict[str, Any]) -> None:
    """A value of the wrong kind is refused before the backbone is touched."""
    model = backbones.build("bert")
    arguments = {"modified_modules": ["query"], **arguments}
    (name,) = {k for k in arguments if k != "modified_modules"} or {"modified_modules"}
    word = {"rank_pattern": "rank_pattern|lora_r", "alpha_pattern": "lora_alpha"}.get(name, name)
    with unchanged(model), pytest.raises((ConfigError, AddressingError), match=word):
        LoraModel(model, **arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"delta_type": ["lora"]},
        {"delta_type": None},
        {"backbone_hash_excludes": 5},
        {"backbone_hash_excludes": "encoder.layer"},
        {"weights_sha256": 5},
        {"weights_file": ["model.safetensors"]},
        {"opendelta_version": ["9"]},
        {"lora_r": "8"},
        {"modified_modules": 5},
        {"exclude_modules": {"a": 1}},
    ],
    ids=str,
)
def test_a_config_file_with_a_value_of_the_wrong_kind(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever stands in ``config.json``, the error is the library's own and nothing is put on."""
    _, delta = built("LoraModel", "bert")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    fresh = backbones.build("bert")
    with unchanged(fresh), pytest.raises(ConfigError):
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)


def test_keys_of_old_files_are_accepted_from_old_files_alone() -> None:
    """Leftovers in configs of 0.3.2 are passed over; elsewhere they are mistakes."""
    legacy = {"delta_type": "lora", "bottleneck_dim": 64, "scaled": None, "sequential": False}
    with pytest.raises(UnknownArgumentError, match="bottleneck_dim|scaled|sequential"):
        AutoDeltaConfig.from_dict(legacy)
    with pytest.raises(UnknownArgumentError, match="bottleneck_dim"):
        LoraConfig(bottleneck_dim=64)
    read = AutoDeltaConfig.from_dict({**legacy, "opendelta_version": "0.3.2", "lora_r": 3})
    assert isinstance(read, LoraConfig)
    assert read.to_dict()["lora_r"] == 3
    assert not {"bottleneck_dim", "scaled", "sequential"} & set(read.to_dict())


class NarrowConfig(BaseDeltaConfig):
    """Written by hand, without the base fields."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = width


class NarrowModel(DeltaBase):
    config_class = NarrowConfig
    delta_type = "narrow"

    def __init__(
        self, backbone_model: nn.Module, width: int = 1, modified_modules: list[str] | None = None
    ) -> None:
        DeltaBase.__init__(self, backbone_model, modified_modules)
        self.width = width
        self.add_all_delta_to_backbone(self.backbone_model, self.modified_modules)

    def update_module(self, module: nn.Module, key: str) -> None:
        _, _, target = self.find_module(module, key)
        self.insert_sequential_module(target, nn.Linear(8, 8), "narrow")


def test_a_config_that_takes_too_little_leaves_the_backbone_alone() -> None:
    """The config is made before anything is put on the backbone."""
    model = linears(1)
    with unchanged(model), pytest.raises(TypeError, match="modified_modules"):
        NarrowModel(model, modified_modules=["0"])


# --- files ---------------------------------------------------------------------------------------


def saved_lora(folder: Path) -> tuple[nn.Module, DeltaBase, Tensor]:
    """A delta that was saved into `folder`, with what the backbone computed then."""
    model, delta = built("LoraModel", "bert")
    delta.freeze_module()
    randomise(delta)
    delta.save_finetuned(folder)
    return model, delta, backbones.run(model, "bert")


def loaded(folder: Path) -> Tensor:
    fresh = backbones.build("bert")
    AutoDeltaModel.from_finetuned(folder, backbone_model=fresh)
    return backbones.run(fresh, "bert")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_save_function_that_writes_nothing_keeps_the_old_files(tmp_path: Path) -> None:
    """As on ranks other than the first: what an earlier save left still loads."""
    _, delta, expected = saved_lora(tmp_path)
    before = content(tmp_path)
    randomise(delta, 0.5)
    delta.save_finetuned(tmp_path, save_function=lambda tensors, path: None)
    delta.save_checkpoint(tmp_path, save_func=lambda tensors, path: None)
    assert content(tmp_path) == before
    assert torch.equal(loaded(tmp_path), expected)


def test_a_save_function_that_writes_elsewhere_raises(tmp_path: Path) -> None:
    """One that appends a suffix leaves nothing behind, and the old files as they were."""
    _, delta, _ = saved_lora(tmp_path)
    before = content(tmp_path)

    def appends(tensors: dict[str, Tensor], path: str) -> None:
        torch.save(tensors, path + ".part")

    with pytest.raises(CheckpointError, match=r"\.part"):
        delta.save_finetuned(tmp_path, save_function=appends)
    with pytest.raises(CheckpointError, match=r"\.part"):
        delta.save_checkpoint(tmp_path / "w.bin", save_func=appends)
    assert content(tmp_path) == before


def test_a_config_that_json_cannot_hold_leaves_the_old_files(tmp_path: Path) -> None:
    """Weights are replaced only together with a config that can be written."""
    _, delta, expected = saved_lora(tmp_path)
    before = content(tmp_path)
    randomise(delta, 0.5)
    delta.config.lora_alpha = object()
    with pytest.raises(opendelta.OpenDeltaError, match="cannot be saved"):
        delta.save_finetuned(tmp_path)
    assert content(tmp_path) == before
    assert torch.equal(loaded(tmp_path), expected)


def test_a_file_holds_of_the_backbone_only_what_its_config_lists(tmp_path: Path) -> None:
    """A parameter of the backbone that the config does not list would overwrite it unseen."""
    _, delta, _ = saved_lora(tmp_path)
    name = "embeddings.word_embeddings.weight"
    weight = delta.backbone_model.get_parameter(name)
    tensors = {**delta.checkpoint_tensors(), name: torch.zeros_like(weight)}
    fresh = backbones.build("bert")
    with unchanged(fresh), pytest.raises(CheckpointError, match=name):
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh, state_dict=tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        delta.load_checkpoint(tmp_path)
    assert weight.abs().sum() > 0


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


# --- modules that run their children --------------------------------------------------------------


class Chain(nn.Module):
    """A chain inside a model: `nn.Sequential` runs whatever is registered on it."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.dummy_inputs = {"x": torch.zeros(1, 8)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain(x)


@pytest.mark.parametrize(
    "method",
    [opendelta.AdapterModel, opendelta.LowRankAdapterModel, opendelta.ParallelAdapterModel],
)
def test_a_delta_on_a_chain_acts_once(method: type[DeltaBase], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chain().eval()
    x = torch.randn(3, 8)
    bare = model(x)
    parallel = method is opendelta.ParallelAdapterModel
    options = {"modified_modules": ["chain"] * (2 if parallel else 1)}
    delta = method(model, **options)
    for p in delta.parameters():
        nn.init.normal_(p, std=0.5)
    layer = delta.insertions[0].module
    expected = bare + layer(x) if parallel else layer(bare)
    assert torch.allclose(model(x), expected)
    name = next(name for name, _ in model.named_parameters() if "down" in name)
    assert name.startswith("chain." + delta.insertions[0].name) and name in model.state_dict()
    assert type(layer).__name__ in str(model) and type(layer).__name__ in str(
        opendelta.Visualization(model).structure_graph(printTree=False)
    )

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(twin(x), expected)
        (theirs,) = opendelta.deltas(twin)
        for p in theirs.parameters():
            nn.init.zeros_(p)
        assert torch.allclose(twin(x), bare) and torch.allclose(model(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), expected)
    model.train()
    assert layer.training and not model.eval().chain[2].training and not layer.training
    model.double()
    assert next(layer.parameters()).dtype == torch.float64
    model.float()

    delta.freeze_module()
    model(x).sum().backward()
    assert all(p.grad is not None for p in delta.parameters())
    delta.save_finetuned(tmp_path)
    torch.manual_seed(0)
    other = Chain().eval()
    opendelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=other)
    assert torch.equal(other(x), model(x))
    delta.detach()
    assert torch.equal(model(x), bare) and len(model.chain) == 2
    delta.attach()
    assert torch.allclose(model(x), expected)
    delta.remove()
    assert torch.equal(model(x), bare) and len(model.chain) == 2


class Runner(nn.Module):
    """A module of a user's own that goes through its children."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_a_delta_beside_what_a_module_runs_acts_once_on_replicas_too(own: bool) -> None:
    torch.manual_seed(0)
    model, x = Chain().eval(), torch.randn(3, 8)
    if own:
        model.chain = Runner().eval()
    bare = model(x)
    delta = opendelta.AdapterModel(model, modified_modules=["chain"])
    randomise(delta)
    expected = delta.insertions[0].module(bare)
    assert not torch.equal(expected, bare)
    assert torch.equal(model(x), expected)
    replica = replicate(model)
    for p in delta.parameters():
        p.zero_()
    assert torch.equal(model(x), bare) and torch.equal(replica(x), expected)
