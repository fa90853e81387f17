"""The hash of a backbone: what it covers, and what is said when it differs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import warnings
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import weights
import xxhash
from cases import built, randomise
from own_methods import OtherParameterModel
from pieces import linears, parameter_names
from placed import PLACED, PLACED_METHODS, place, unchanged
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from opendelta import (
    AutoDeltaConfig,
    AutoDeltaModel,
    BackboneMismatchWarning,
    BitFitModel,
    DeltaWarning,
    LoraModel,
    gen_model_hash,
    gen_parameter_hash,
)
from opendelta.exceptions import ConfigError

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


def lines_by_hand(tensors: dict[str, Tensor]) -> str:
    """The text of format 2 for plain tensors."""
    text = ""
    for name, tensor in sorted(tensors.items()):
        raw = bytes(tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage())
        pieces = [raw[start : start + 2**20] for start in range(0, len(raw), 2**20)]
        digest = xxhash.xxh3_128(b"".join(xxhash.xxh3_128(piece).digest() for piece in pieces))
        shape = "x".join(str(size) for size in tensor.shape)
        text += f"{name} {str(tensor.dtype)[6:]} {shape} {digest.hexdigest()}\n"
    return text


def format_2(model: nn.Module, left_out: frozenset[str] = frozenset()) -> str:
    """By hand, of a bare model: its whole state dict."""
    tensors = {name: t for name, t in model.state_dict().items() if name not in left_out}
    return hashlib.md5(lines_by_hand(tensors).encode()).hexdigest()


def all_hashes(model: nn.Module) -> tuple[str, ...]:
    return gen_model_hash(model), gen_model_hash(model, False), gen_model_hash(model, format=2)


def add_one(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.state_dict(keep_vars=True)[name].view(-1)[0] += 1


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


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_model_is_never_copied(dtype: torch.dtype, number: int) -> None:
    model = backbones.build("bert").to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with LargestStorage(known) as watch:
        gen_model_hash(model, format=number)
    assert watch.largest < size / 4


# --- format 2 -------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A tensor of each kind, made of numbers that every dtype holds exactly."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.arange(-5.0, 7.0).view(3, 4) / 4
        self.brief = nn.Parameter(values.to(torch.bfloat16))
        self.turned = nn.Parameter(values.t())
        self.long = nn.Parameter(torch.arange(300_000.0))  # more than one piece of 1 MiB
        self.none = nn.Parameter(torch.empty(0, 3))
        codes = torch.quantize_per_tensor(values, 0.25, 3, torch.qint8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.inner = nn.Module()
        self.inner.tied = self.brief


KINDS = """\
brief bfloat16 3x4 bfc4e75906146a16d011ceec1be50ddf
codes.int_repr int8 3x4 42ba3a62282dfd8766dccb426ac33da2
codes.scale float64  70f2d9ac65029c133c1f3afc2b3c57c4
codes.zero_point int64  97a0456278a77271774ba4894bfe1bbf
count int64  b47aaac0f597912865dbbba42e0ff19c
inner.tied bfloat16 3x4 bfc4e75906146a16d011ceec1be50ddf
long float32 300000 e8abf39a2225237230495b27087b1358
none float32 0x3 99aa06d3014798d86001c324468d497f
turned float32 4x3 ba5f306e37233a0f3355305a48595507
"""


@pytest.fixture
def kinds() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per", UserWarning)
        return Kinds()


def of_text(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def test_known_answers(kinds: Any) -> None:
    assert of_text(KINDS) == "e27654c7d39756a3c83555ea90764b43"
    assert gen_model_hash(kinds, format=2) == "e27654c7d39756a3c83555ea90764b43"


def known_without(*names: str) -> str:
    """The hash without the lines of these children of `Kinds`."""
    lines = KINDS.splitlines(keepends=True)
    return of_text("".join(line for line in lines if re.split("[. ]", line)[0] not in names))


@pytest.mark.parametrize("name", ["turned", "long", "none", "codes", "count"])
def test_a_tensor_is_left_out_by_its_name(kinds: Any, name: str) -> None:
    assert gen_model_hash(kinds, format=2, excludes=[name]) == known_without(name)


@pytest.mark.parametrize("name", ["brief", "inner.tied"])
def test_a_tied_tensor_is_left_out_by_either_name(kinds: Any, name: str) -> None:
    assert gen_model_hash(kinds, format=2, excludes=[name]) == known_without("brief", "inner")


def test_strides_do_not_count(kinds: Any) -> None:
    kinds.turned = nn.Parameter(kinds.turned.detach().contiguous())
    kinds.long = nn.Parameter(kinds.long.detach().repeat_interleave(2)[::2])
    kinds.count = kinds.count.expand(3)[1]
    assert not kinds.long.is_contiguous()
    assert gen_model_hash(kinds, format=2) == of_text(KINDS)


def test_shards_do_not_count(kinds: Any) -> None:
    del kinds.codes, kinds.turned  # which FSDP2 does not take
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(kinds, mesh=init_device_mesh("cpu", (1,)))
        assert hasattr(kinds.long, "placements")
        assert gen_model_hash(kinds, format=2) == known_without("codes", "turned")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backbone", ["toy", "mlp", "bert_cls", "gpt2", "t5", "bart", "deberta"])
def test_format_2_is_the_whole_state_dict(backbone: str) -> None:
    model = backbones.build(backbone)
    assert gen_model_hash(model, format=2) == format_2(model)
    model.to(torch.bfloat16)
    assert gen_model_hash(model, format=2) == format_2(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_in_format_2(dtype: str) -> None:
    model = nn.Module()
    values = torch.arange(-5, 7).reshape(3, 4).to(torch.float32).to(getattr(torch, dtype))
    model.register_buffer("b", values.t())
    digest = lines_by_hand({"b": values.t()})
    assert digest.startswith(f"b {dtype} 4x3 ")
    assert gen_model_hash(model, format=2) == of_text(digest)


def test_every_tensor_counts_and_nothing_that_is_printed() -> None:
    class Renamed(nn.Sequential):
        pass

    def build(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
        torch.manual_seed(0)
        return kind(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2)).eval()

    first = gen_model_hash(build(), format=2)
    other = build(Renamed).train().requires_grad_(False)
    other[2] = nn.Tanh()
    assert gen_model_hash(other, format=2) == first
    seen = {first}
    for name in build().state_dict():
        model = build()
        add_one(model, name)
        seen.add(gen_model_hash(model, format=2))
    assert len(seen) == 1 + len(build().state_dict()) == 10


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_the_parts_of_other_tensors() -> None:
    """By the texts of the parts: per-channel integers and sparse buffers."""
    values = weights.uniform("q", (4, 6), 1.0)
    scales, zeros = torch.full((4,), 0.01).double(), torch.arange(4)
    model = nn.Module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per", UserWarning)
        codes = torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)
    model.register_buffer("q", codes)
    dense = torch.eye(3)
    model.register_buffer("s", dense.to_sparse())
    parts = {
        "q.int_repr": codes.int_repr(),
        "q.scale": scales,
        "q.zero_point": zeros,
        "q.axis": torch.tensor(0),
        "s.indices": torch.tensor([[0, 1, 2], [0, 1, 2]]),
        "s.values": torch.ones(3),
        "s.size": torch.tensor([3, 3]),
    }
    assert gen_model_hash(model, format=2) == of_text(lines_by_hand(parts))
    model.s = dense.to_sparse_csr()
    assert gen_model_hash(model, format=2) == of_text(lines_by_hand(parts))


def test_formats_that_there_are_not() -> None:
    model = backbones.build("mlp")
    with pytest.raises(ConfigError, match="format=3; expected 1 or 2"):
        gen_model_hash(model, format=3)
    with pytest.raises(ConfigError, match="with_parameters=False is for format 1"):
        gen_model_hash(model, False, format=2)


# --- without its deltas ---------------------------------------------------------------------------


@placed
def test_the_same_before_and_after_insertion(method: str, backbone: str) -> None:
    model = backbones.build(backbone)
    bare = all_hashes(model)
    delta = place(method, backbone, model)

    def same() -> bool:
        return all_hashes(model) == bare

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
        all_hashes(delta.backbone_model)
    assert torch.equal(backbones.run(delta.backbone_model, backbone), expected)


def test_a_detached_delta_stays_detached_and_a_half_attached_one_half() -> None:
    delta = place("LoraModel", "bert_cls")
    randomise(delta)
    delta.detach(delta.backbone_model.bert.encoder.layer[0])
    expected = backbones.run(delta.backbone_model, "bert_cls")
    with unchanged(delta.backbone_model):
        all_hashes(delta.backbone_model)
    assert torch.equal(backbones.run(delta.backbone_model, "bert_cls"), expected)


def test_the_backbones_own_changes_still_show() -> None:
    model = backbones.build("bert_cls")
    bare = all_hashes(model)
    place("AdapterModel", "bert_cls", model)
    add_one(model, "classifier.bias")
    changed = all_hashes(model)
    assert [a == b for a, b in zip(bare, changed, strict=True)] == [False, True, False]


def test_biases_that_bitfit_adds_or_replaces_do_not_count() -> None:
    """The structure's text says bias=False as before, and the bytes are the backbone's own."""
    model: Any = backbones.build("t5")
    bare = all_hashes(model)
    text = str(model)
    delta = BitFitModel(model, modified_modules=["SelfAttention", "wo", "layer_norm"])
    assert model.encoder.block[0].layer[0].SelfAttention.q.bias is not None
    randomise(delta)
    assert all_hashes(model) == bare
    delta.detach()
    assert str(model) == text

    bert = backbones.build("bert_cls")
    bare = all_hashes(bert)
    randomise(BitFitModel(bert, modified_modules=["attention"]))
    assert all_hashes(bert) == bare


@pytest.mark.parametrize(
    ("backbone", "module"), [("mlp", "first"), ("bert_cls", "query"), ("toy", "name_a")]
)
def test_several_parameters_of_one_module_that_deltas_replaced(backbone: str, module: str) -> None:
    model = backbones.build(backbone)
    bare = all_hashes(model)
    made = [
        OtherParameterModel(model, which=which, modified_modules=[module])
        for which in ("weight", "bias")
    ]
    assert all_hashes(model) == bare
    for delta in made:
        delta.detach()
        assert all_hashes(model) == bare


class _Sharded:
    """Stands for the class that a sharding engine mixes into a module's."""


def shard_class(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type(f"FSDP{cls.__name__}", (_Sharded, cls), {})


@pytest.mark.parametrize("with_delta", [False, True])
def test_classes_that_a_sharding_engine_renamed_count_as_before(with_delta: bool) -> None:
    model: Any = backbones.build("bert_cls")
    bare = all_hashes(model)
    if with_delta:
        place("LoraModel", "bert_cls", model)
    for layer in model.bert.encoder.layer:
        shard_class(layer)
    shard_class(model.classifier)
    shard_class(model)
    assert "FSDPBertLayer" in str(model)
    assert all_hashes(model) == bare


def test_a_compiled_backbone_has_the_hash_of_the_plain_one() -> None:
    model = backbones.build("mlp")
    assert all_hashes(torch.compile(model, backend="eager")) == all_hashes(model)


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
        assert config["backbone_hash"] == gen_model_hash(bare, format=2)
    assert config["backbone_hash"] == format_2(bare, frozenset(left_out))
    assert config["backbone_hash_format"] == 2


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
    left_out = frozenset(config["backbone_hash_excludes"])
    assert config["backbone_hash"] == format_2(backbones.build("bert_cls"), left_out)
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
        actual = format_2(other, left_out)
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


@pytest.mark.parametrize("what", ["more", "another shape", "another dtype", "another name"])
def test_other_tensors_warn_too(what: str, tmp_path: Path) -> None:
    saved("LoraModel", "mlp", tmp_path)
    other: Any = backbones.build("mlp")
    norm = other.last[0]
    if what == "more":
        other.act = nn.PReLU()
    elif what == "another shape":
        norm.bias = nn.Parameter(norm.bias.detach().view(1, 8))
    elif what == "another dtype":
        norm.double()
    else:
        norm.renamed, norm.bias = norm.bias, None
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
    bare = gen_model_hash(model, format=2)
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


# --- files of other releases ----------------------------------------------------------------------


def as_1_0_wrote(folder: Path, backbone: nn.Module, **changed: Any) -> None:
    """Make a config one of OpenDelta 1.0."""
    config = json.loads((folder / "config.json").read_text())
    del config["backbone_hash_format"]
    config["opendelta_version"] = "1.0.0"
    config["backbone_hash"] = gen_model_hash(backbone, excludes=config["backbone_hash_excludes"])
    (folder / "config.json").write_text(json.dumps(config | changed))


def load_both_ways(folder: Path, model: Any) -> None:
    """From the file, and from the config of the delta that was loaded."""
    delta = AutoDeltaModel.from_finetuned(folder, model())
    AutoDeltaModel.from_config(delta.config, model())


@each_method
def test_a_file_of_1_0_is_compared_as_1_0_did(method: str, tmp_path: Path) -> None:
    saved(method, "bert_cls", tmp_path, exclude=["deltas", "classifier"])
    as_1_0_wrote(tmp_path, backbones.build("bert_cls"))
    quiet(lambda: load_both_ways(tmp_path, lambda: backbones.build("bert_cls")))
    for check_hash in (True, "full"):
        other = backbones.build("bert_cls")
        add_one(other, "bert.embeddings.word_embeddings.weight")
        with pytest.warns(BackboneMismatchWarning):
            AutoDeltaModel.from_finetuned(tmp_path, other, check_hash=check_hash)


def says_nothing_is_compared(folder: Path, match: str) -> None:
    """Once for each loading, whatever the backbone is, and no mismatch."""

    def build() -> nn.Module:
        model = backbones.build("bert_cls")
        add_one(model, "bert.embeddings.word_embeddings.weight")
        return model

    for check_hash in (True, "full"):
        with pytest.warns(DeltaWarning, match=match) as seen:
            delta = AutoDeltaModel.from_finetuned(folder, build(), check_hash=check_hash)
        assert [w.category for w in seen] == [DeltaWarning] and seen[0].filename == __file__
    with pytest.warns(DeltaWarning, match=match) as seen:
        AutoDeltaModel.from_config(delta.config, build())
    assert [w.category for w in seen] == [DeltaWarning]
    quiet(lambda: AutoDeltaModel.from_finetuned(folder, build(), check_hash=False))

    delta.save_finetuned(folder)  # which is how to come by a hash that is compared
    quiet(lambda: AutoDeltaModel.from_finetuned(folder, build()))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.Linear, nn.Dropout])
def test_a_file_of_1_0_where_torch_prints_otherwise(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("LoraModel", "bert_cls", tmp_path)
    as_1_0_wrote(tmp_path, backbones.build("bert_cls"))
    monkeypatch.setattr(kind, "extra_repr", lambda self: "printed otherwise")
    here = re.escape(torch.__version__)
    says_nothing_is_compared(tmp_path, f"as torch 2.13 prints it, and this one, {here}, prints")


@pytest.mark.parametrize("version", ["0.3.0", "0.3.2"])
def test_a_file_of_0_3_2_is_not_compared(version: str, tmp_path: Path) -> None:
    saved("LoraModel", "bert_cls", tmp_path)
    as_1_0_wrote(tmp_path, backbones.build("bert_cls"), opendelta_version=version)
    says_nothing_is_compared(tmp_path, "OpenDelta 0.3.2 hashed the printed model")


def test_a_hash_of_a_format_to_come_is_not_compared(tmp_path: Path) -> None:
    saved("LoraModel", "bert_cls", tmp_path)
    as_1_0_wrote(tmp_path, backbones.build("bert_cls"), backbone_hash_format=3)
    says_nothing_is_compared(tmp_path, "of format 3, which this release")


def test_looking_how_torch_prints_draws_no_random_numbers(tmp_path: Path) -> None:
    saved("LoraModel", "mlp", tmp_path)
    as_1_0_wrote(tmp_path, backbones.build("mlp"))
    config = AutoDeltaConfig.from_finetuned(tmp_path)
    drawn = []
    for check_hash in (True, False):
        model = backbones.build("mlp")
        torch.manual_seed(0)
        AutoDeltaModel.from_config(config, model, check_hash=check_hash)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight"])
def test_a_tied_tensor_that_the_file_carries_does_not_count(name: str, tmp_path: Path) -> None:
    """Under either of its names; where the tie was undone, the other end is another backbone's."""
    config = saved("LoraModel", "gpt2", tmp_path, exclude=["deltas", name.rpartition(".")[0]])
    assert len(config["backbone_hash_excludes"]) == 1
    ends = frozenset({"transformer.wte.weight", "lm_head.weight"})
    assert config["backbone_hash"] == format_2(backbones.build("gpt2"), ends)
    fresh = backbones.build("gpt2")
    add_one(fresh, name)
    quiet(lambda: AutoDeltaModel.from_finetuned(tmp_path, fresh))
    untied: Any = backbones.build("gpt2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.warns(BackboneMismatchWarning):
        AutoDeltaModel.from_finetuned(tmp_path, untied)


# --- a hash only looks ---------------------------------------------------------------------------


def test_hashing_does_not_disturb_a_running_model() -> None:
    """The hash of a model that another thread runs: the deltas stay where they are meanwhile."""
    model, delta = built("LoraModel", "bert")
    randomise(delta)
    expected = backbones.run(model, "bert")
    digest = all_hashes(model)
    stop = threading.Event()
    digests: set[tuple[str, ...]] = set()

    def hash_on() -> None:
        while not stop.is_set():
            digests.add(all_hashes(model))

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
    all_hashes(model)
    assert parameter_names(model) == before
    assert not any(module.training for module in delta.modules())
