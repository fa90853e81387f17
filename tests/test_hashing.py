"""The md5 of a backbone: what it covers, and what is said when it differs."""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import weights
from cases import built, randomise
from pieces import linears, parameter_names
from placed import PLACED, PLACED_METHODS, place, unchanged
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from opendelta import (
    AutoDeltaConfig,
    AutoDeltaModel,
    BackboneMismatchWarning,
    BitFitModel,
    LoraModel,
    gen_model_hash,
    gen_parameter_hash,
)

placed = pytest.mark.parametrize(("method", "backbone"), PLACED)
each_method = pytest.mark.parametrize("method", PLACED_METHODS)


def by_hand(
    model: nn.Module, with_parameters: bool = True, left_out: frozenset[str] = frozenset()
) -> str:
    """md5 of the printed structure without whitespace, then of each parameter's bytes."""
    md5 = hashlib.md5("".join(str(model).split()).encode())
    if with_parameters:
        for name, p in model.named_parameters():
            if name not in left_out:
                md5.update(p.detach().numpy().tobytes())
    return md5.hexdigest()


def add_one(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] += 1


# --- the functions --------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["toy", "mlp", "bert_cls", "gpt2", "t5"])
def test_the_hash_is_that_of_structure_and_parameters(backbone: str) -> None:
    model = backbones.build(backbone)
    assert gen_model_hash(model) == by_hand(model)
    assert gen_model_hash(model, with_parameters=False) == by_hand(model, with_parameters=False)
    assert gen_model_hash(model) != gen_model_hash(model, False)


def test_every_parameter_and_the_structure_count() -> None:
    first = gen_model_hash(backbones.build("mlp"))
    seen = {first}
    for name, _ in backbones.build("mlp").named_parameters():
        model = backbones.build("mlp")
        add_one(model, name)
        seen.add(gen_model_hash(model))
    other: Any = backbones.build("mlp")
    other.act = nn.Tanh()
    seen.add(gen_model_hash(other))
    assert len(seen) == 2 + len(list(backbones.build("mlp").named_parameters()))
    assert gen_model_hash(backbones.build("mlp")) == first


def test_what_does_not_count() -> None:
    """Train mode, requires_grad, gradients: none of them changes what the delta relies on."""
    model = backbones.build("mlp")
    first = gen_model_hash(model)
    model(**backbones.inputs("mlp")).sum().backward()
    model.train().requires_grad_(False)
    assert gen_model_hash(model) == first


def test_gen_parameter_hash_goes_on_with_a_given_md5() -> None:
    tensors = [weights.uniform(str(i), (3, 4), 1.0) for i in range(3)]
    expected = hashlib.md5(b"".join(t.numpy().tobytes() for t in tensors))
    assert gen_parameter_hash(tensors).hexdigest() == expected.hexdigest()
    assert gen_parameter_hash(iter(tensors)).hexdigest() == expected.hexdigest()
    started = hashlib.md5(b"before")
    gone_on = gen_parameter_hash(tensors, started)
    expected = hashlib.md5(b"before" + b"".join(t.numpy().tobytes() for t in tensors))
    assert gone_on.hexdigest() == expected.hexdigest()


DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 "
    "int64 int32 int16 int8 uint8 bool"
).split()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype(dtype: str) -> None:
    values = torch.arange(-5, 7).reshape(3, 4)
    tensor = values.to(torch.float32).to(getattr(torch, dtype))
    other = tensor.clone()
    other[1, 1] = 1
    raw = bytes(tensor.contiguous().untyped_storage())
    assert gen_parameter_hash([tensor]).hexdigest() == hashlib.md5(raw).hexdigest()
    assert gen_parameter_hash([other]).hexdigest() != hashlib.md5(raw).hexdigest()


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
def test_quantised_tensors() -> None:
    values = weights.uniform("q", (4, 6), 1.0)
    tensor = torch.quantize_per_tensor(values, 0.01, 3, torch.qint8)
    channels = torch.quantize_per_channel(
        values, torch.full((4,), 0.01), torch.zeros(4), 0, torch.qint8
    )
    other = torch.quantize_per_tensor(values + 0.5, 0.01, 3, torch.qint8)
    hashes = [gen_parameter_hash([t]).hexdigest() for t in (tensor, channels, other, tensor)]
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3


def test_shapes_of_all_kinds() -> None:
    """Scalars, empty tensors, and views that are not contiguous."""
    base = weights.uniform("x", (4, 6), 1.0)
    for view in (base.t(), base[:, ::2], base[:1].expand(3, 6), base.flip(0)):
        assert (
            gen_parameter_hash([view]).hexdigest()
            == hashlib.md5(view.numpy().tobytes()).hexdigest()
        )
    scalar = torch.tensor(1.5)
    assert (
        gen_parameter_hash([scalar]).hexdigest()
        == hashlib.md5(scalar.numpy().tobytes()).hexdigest()
    )
    assert gen_parameter_hash([torch.empty(0, 3)]).hexdigest() == hashlib.md5().hexdigest()
    assert (
        gen_parameter_hash([nn.Parameter(base)]).hexdigest()
        == gen_parameter_hash([base]).hexdigest()
    )


class LargestStorage(TorchDispatchMode):
    """Notes the size of the largest storage that any operation makes."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.untyped_storage().data_ptr() not in self.known
        ):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_model_is_never_copied(dtype: torch.dtype) -> None:
    model = backbones.build("bert").to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with LargestStorage(known) as watch:
        gen_model_hash(model)
    assert watch.largest < size / 4


# --- without its deltas ---------------------------------------------------------------------------


@placed
def test_the_same_before_and_after_insertion(method: str, backbone: str) -> None:
    model = backbones.build(backbone)
    bare, structure = gen_model_hash(model), gen_model_hash(model, with_parameters=False)
    delta = place(method, backbone, model)

    def same() -> bool:
        return gen_model_hash(model) == bare and gen_model_hash(model, False) == structure

    assert same()
    randomise(delta)
    delta.freeze_module()
    assert same()
    second = place("LoraModel", backbone, model)
    assert same()
    delta.detach()
    assert same()
    second.remove()
    delta.remove()
    assert same()


@placed
def test_hashing_leaves_everything_in_place(method: str, backbone: str) -> None:
    delta = place(method, backbone)
    randomise(delta)
    delta.freeze_module()
    expected = backbones.run(delta.backbone_model, backbone)
    with unchanged(delta.backbone_model):
        gen_model_hash(delta.backbone_model)
    assert torch.equal(backbones.run(delta.backbone_model, backbone), expected)


def test_a_detached_delta_stays_detached_and_a_half_attached_one_half() -> None:
    delta = place("LoraModel", "bert_cls")
    randomise(delta)
    delta.detach(delta.backbone_model.bert.encoder.layer[0])
    expected = backbones.run(delta.backbone_model, "bert_cls")
    with unchanged(delta.backbone_model):
        gen_model_hash(delta.backbone_model)
    assert torch.equal(backbones.run(delta.backbone_model, "bert_cls"), expected)


def test_the_backbones_own_changes_still_show() -> None:
    model = backbones.build("bert_cls")
    bare = gen_model_hash(model)
    place("AdapterModel", "bert_cls", model)
    add_one(model, "classifier.bias")
    assert gen_model_hash(model) != bare


def test_biases_that_bitfit_adds_or_replaces_do_not_count() -> None:
    """The structure's text says bias=False as before, and the bytes are the backbone's own."""
    model: Any = backbones.build("t5")
    bare = gen_model_hash(model), gen_model_hash(model, False)
    text = str(model)
    delta = BitFitModel(model, modified_modules=["SelfAttention", "wo", "layer_norm"])
    assert model.encoder.block[0].layer[0].SelfAttention.q.bias is not None
    randomise(delta)
    assert (gen_model_hash(model), gen_model_hash(model, False)) == bare
    delta.detach()
    assert str(model) == text

    bert = backbones.build("bert_cls")
    bare = gen_model_hash(bert), gen_model_hash(bert, False)
    randomise(BitFitModel(bert, modified_modules=["attention"]))
    assert (gen_model_hash(bert), gen_model_hash(bert, False)) == bare


class _Sharded:
    """Stands for the class that a sharding engine mixes into a module's."""


def shard_class(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type(f"FSDP{cls.__name__}", (_Sharded, cls), {})


@pytest.mark.parametrize("with_delta", [False, True])
def test_classes_that_a_sharding_engine_renamed_count_as_before(with_delta: bool) -> None:
    model: Any = backbones.build("bert_cls")
    bare = gen_model_hash(model), gen_model_hash(model, False)
    if with_delta:
        place("LoraModel", "bert_cls", model)
    for layer in model.bert.encoder.layer:
        shard_class(layer)
    shard_class(model.classifier)
    shard_class(model)
    assert "FSDPBertLayer" in str(model)
    assert (gen_model_hash(model), gen_model_hash(model, False)) == bare


def test_a_compiled_backbone_has_the_hash_of_the_plain_one() -> None:
    model = backbones.build("mlp")
    assert gen_model_hash(torch.compile(model, backend="eager")) == gen_model_hash(model)


# --- in configs -----------------------------------------------------------------------------------


def saved(
    method: str, backbone: str, folder: Path, exclude: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Train and save a delta; the config it wrote."""
    delta = place(method, backbone, **kwargs)
    randomise(delta)
    delta.freeze_module(exclude=exclude)
    own = {id(p) for p in delta.parameters()}
    for name, p in delta.backbone_model.named_parameters():
        if p.requires_grad and id(p) not in own:
            add_one(delta.backbone_model, name)
    delta.save_finetuned(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def quiet(call: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


@placed
def test_where_only_the_delta_trains_it_is_the_bare_backbones(
    method: str, backbone: str, tmp_path: Path
) -> None:
    config = saved(method, backbone, tmp_path)
    bare = backbones.build(backbone)
    left_out = config.get("backbone_hash_excludes") or []
    if method == "BitFitModel":  # carries the biases that it trained
        assert left_out == sorted(
            n
            for n, _ in place(method, backbone).named_parameters()
            if n in dict(bare.named_parameters())
        )
    else:
        assert left_out == []
        assert config["backbone_hash"] == gen_model_hash(bare)
    assert config["backbone_hash"] == by_hand(bare, left_out=frozenset(left_out))


@placed
def test_a_fresh_backbone_does_not_warn(method: str, backbone: str, tmp_path: Path) -> None:
    saved(method, backbone, tmp_path)
    quiet(lambda: AutoDeltaModel.from_finetuned(tmp_path, backbone_model=backbones.build(backbone)))
    config = AutoDeltaConfig.from_finetuned(tmp_path)
    quiet(lambda: AutoDeltaModel.from_config(config, backbones.build(backbone)))
    quiet(lambda: AutoDeltaModel.from_config(config.to_dict(), backbones.build(backbone)))


@each_method
def test_what_was_trained_and_saved_never_causes_a_mismatch(method: str, tmp_path: Path) -> None:
    """Neither when it was trained, nor where the fresh head is another random one."""
    config = saved(
        method, "bert_cls", tmp_path, exclude=["deltas", "classifier", "0.output.dense.bias"]
    )
    named = {"classifier.weight", "classifier.bias", "bert.encoder.layer.0.output.dense.bias"}
    assert named <= set(config["backbone_hash_excludes"])
    assert config["backbone_hash"] == by_hand(
        backbones.build("bert_cls"), left_out=frozenset(config["backbone_hash_excludes"])
    )
    for call in (
        lambda model: AutoDeltaModel.from_finetuned(tmp_path, model),
        lambda model: AutoDeltaModel.from_config(AutoDeltaConfig.from_finetuned(tmp_path), model),
    ):
        fresh = backbones.build("bert_cls")
        for name in named:
            add_one(fresh, name)
        quiet(lambda call=call, fresh=fresh: call(fresh))


@pytest.mark.parametrize("exclude", [None, ["deltas", "classifier"]])
@each_method
def test_another_backbone_warns_with_both_values(method: str, exclude: Any, tmp_path: Path) -> None:
    config = saved(method, "bert_cls", tmp_path, exclude=exclude)
    left_out = frozenset(config["backbone_hash_excludes"] or ())
    for load in (
        lambda model, **kw: AutoDeltaModel.from_finetuned(tmp_path, model, **kw),
        lambda model, **kw: AutoDeltaModel.from_config(
            AutoDeltaConfig.from_finetuned(tmp_path), model, **kw
        ),
        lambda model, **kw: AutoDeltaModel.from_config(config, model, **kw),
    ):
        other = backbones.build("bert_cls")
        add_one(other, "bert.embeddings.word_embeddings.weight")
        actual = by_hand(other, left_out=left_out)
        with pytest.warns(BackboneMismatchWarning) as seen:
            delta = load(other)
        message = str(seen[0].message)
        assert len(seen) == 1
        assert config["backbone_hash"] in message and actual in message
        assert delta.is_attached
        again = backbones.build("bert_cls")
        add_one(again, "bert.embeddings.word_embeddings.weight")
        quiet(lambda load=load, again=again: load(again, check_hash=False))


def test_the_saved_tensors_decide_what_the_hash_covers(tmp_path: Path) -> None:
    """Also where the caller gave them: here the file carries the classifier."""
    delta = place("LoraModel", "bert_cls")
    model: Any = delta.backbone_model
    given = dict(delta.named_parameters()) | {
        f"classifier.{name}": p + 1 for name, p in model.classifier.named_parameters()
    }
    delta.freeze_module()
    delta.save_finetuned(tmp_path, state_dict={name: p.detach() for name, p in given.items()})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["backbone_hash_excludes"] == ["classifier.bias", "classifier.weight"]
    fresh: Any = backbones.build("bert_cls")
    add_one(fresh, "classifier.weight")
    quiet(lambda: AutoDeltaModel.from_finetuned(tmp_path, fresh))
    assert torch.equal(fresh.classifier.weight, model.classifier.weight + 1)


def test_another_structure_warns_too(tmp_path: Path) -> None:
    """Same parameters, another activation."""
    saved("LoraModel", "mlp", tmp_path)
    other: Any = backbones.build("mlp")
    other.act = nn.Tanh()
    with pytest.warns(BackboneMismatchWarning):
        AutoDeltaModel.from_finetuned(tmp_path, other)


def test_the_warning_points_at_the_callers_line(tmp_path: Path) -> None:
    saved("LoraModel", "mlp", tmp_path)
    for cls in (LoraModel, AutoDeltaModel):
        other = backbones.build("mlp")
        add_one(other, "first.weight")
        with pytest.warns(BackboneMismatchWarning) as seen:
            cls.from_finetuned(tmp_path, other)
        assert seen[0].filename == __file__


def test_a_warning_made_an_error_leaves_the_backbone_alone(tmp_path: Path) -> None:
    saved("LoraModel", "mlp", tmp_path, exclude=["deltas", "last"])
    other = backbones.build("mlp").train()
    add_one(other, "first.weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackboneMismatchWarning)
        with unchanged(other), pytest.raises(BackboneMismatchWarning):
            AutoDeltaModel.from_finetuned(tmp_path, other)


def test_a_backbone_that_carries_other_deltas_is_compared_bare(tmp_path: Path) -> None:
    saved("LoraModel", "bert_cls", tmp_path)
    model = backbones.build("bert_cls")
    for method in PLACED_METHODS:
        randomise(place(method, "bert_cls", model))
    quiet(lambda: AutoDeltaModel.from_finetuned(tmp_path, model))


def test_deltas_saved_side_by_side_have_the_same_hash(tmp_path: Path) -> None:
    model = backbones.build("bert_cls")
    bare = gen_model_hash(model)
    made = [place(method, "bert_cls", model) for method in ("LoraModel", "AdapterModel")]
    for delta in made:
        randomise(delta)
        delta.freeze_module()
    for count, delta in enumerate(made):
        delta.save_finetuned(tmp_path / str(count))
        assert delta.config.backbone_hash == bare


def test_bf16_backbones(tmp_path: Path) -> None:
    model = backbones.build("bert_cls").to(torch.bfloat16)
    delta = LoraModel(model, modified_modules=["query"])
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    quiet(
        lambda: AutoDeltaModel.from_finetuned(
            tmp_path, backbones.build("bert_cls").to(torch.bfloat16)
        )
    )
    with pytest.warns(BackboneMismatchWarning):
        AutoDeltaModel.from_finetuned(tmp_path, backbones.build("bert_cls"))


def test_a_config_without_hash_is_not_compared() -> None:
    model = backbones.build("mlp")
    quiet(
        lambda: LoraModel.from_config({"delta_type": "lora", "modified_modules": ["first"]}, model)
    )


# --- a hash only looks ---------------------------------------------------------------------------


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


def test_hashing_changes_neither_the_deltas_mode_nor_any_order() -> None:
    """A hash only looks: ``delta.eval()`` holds, and parameters keep the order of optimizers."""
    model = linears(1)
    delta = LoraModel(model, modified_modules=["0"], lora_dropout=0.1)
    model[0].extra = nn.Linear(2, 2)
    model.train()
    delta.eval()
    before = parameter_names(model)
    gen_model_hash(model)
    assert parameter_names(model) == before
    assert not any(module.training for module in delta.modules())
