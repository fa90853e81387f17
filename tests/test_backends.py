"""Layers of BMTrain, quantised and offloaded ones, as far as they need no package or GPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import backbones
import cases
import placed
import pytest
import torch
import transformers
from cases import METHODS, put, randomise
from pieces import BF16, dtypes
from placed import unchanged
from torch import Tensor, nn

import opendelta
from opendelta import AdapterModel, CommonStructureMap, DeltaBase, LoraModel
from opendelta.exceptions import CheckpointError, ConfigError, InsertionError

IDS = torch.arange(8).view(2, 4) + 3


# --- BMTrain ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", placed.PLACED_METHODS)
def test_bmt_without_bmtrain_leaves_the_backbone_alone(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bmtrain", None)  # any import of it fails
    model = backbones.build("bert")
    with placed.unchanged(model), pytest.raises(ConfigError, match="pip install bmtrain"):
        cases.put(method, "bert", model, backend="bmt")


def test_bmt_without_initialisation_says_what_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = types.ModuleType("bmtrain")
    engine.init = types.SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "bmtrain", engine)
    model = backbones.build("bert")
    with pytest.raises(ConfigError, match="bmtrain.init_distributed"):
        LoraModel(model, backend="bmt")


def modelcenter(width: int = 8) -> nn.Module:
    """The module tree of ModelCenter's BERT, with torch's layers."""

    def tree(**children: nn.Module) -> nn.Module:
        module = nn.Module()
        for name, child in children.items():
            module.add_module(name, child)
        return module

    def layer() -> nn.Module:
        names = ("project_q", "project_k", "project_v", "attention_out")
        attention = tree(**{name: nn.Linear(width, width) for name in names})
        up = tree(w=nn.Linear(width, 4 * width), act=nn.GELU())
        return tree(
            self_att=tree(layernorm_before_attention=nn.LayerNorm(width), self_attention=attention),
            ffn=tree(
                layernorm_before_ffn=nn.LayerNorm(width),
                ffn=tree(w_in=up, w_out=nn.Linear(4 * width, width)),
            ),
        )

    return tree(
        input_embedding=nn.Embedding(20, width),
        encoder=tree(
            layers=nn.ModuleList(layer() for _ in range(2)), output_layernorm=nn.LayerNorm(width)
        ),
    )


def test_names_of_modelcenter() -> None:
    names = CommonStructureMap(modelcenter()).matched_pairs
    expected = {
        "self_att.self_attention.project_q": "attn.q",
        "self_att.self_attention.project_k": "attn.k",
        "self_att.self_attention.project_v": "attn.v",
        "self_att.self_attention.attention_out": "attn.proj",
        "ffn.ffn.w_in.w": "ff.w1",
        "ffn.ffn.w_out": "ff.w2",
    }
    for name, common in expected.items():
        assert names[f"encoder.layers.1.{name}"] == f"encoder.block.1.{common}"
    assert names["encoder.output_layernorm"] == "encoder.layer_norm"


class Block(nn.Module):
    """A layer in the way of BMTrain's: inside, in an attribute, with all its names handed on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_module", layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def named_modules(self, memo: Any = None, prefix: str = "", *args: Any) -> Any:
        yield prefix, self
        for name, child in self._module._modules.items():
            yield from child.named_modules(memo, f"{prefix}.{name}", *args)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)


@pytest.mark.parametrize("method", cases.METHODS)
def test_deltas_in_blocks_act_as_in_plain_layers(method: str) -> None:
    plain, model = backbones.build("bert"), backbones.build("bert")
    model.encoder.layer = nn.ModuleList(map(Block, model.encoder.layer))
    for one in (plain, model):
        cases.randomise(cases.put(method, "bert", one))
    added = [
        [name for name, _ in opendelta.deltas(one)[0].named_parameters()] for one in (model, plain)
    ]
    assert added[0] == added[1]
    torch.testing.assert_close(cases.output(model, "bert"), cases.output(plain, "bert"))


def test_a_block_itself_is_a_place_for_a_delta() -> None:
    plain, model = backbones.build("bert"), backbones.build("bert")
    model.encoder.layer = nn.ModuleList(map(Block, model.encoder.layer))
    for one in (plain, model):
        cases.randomise(opendelta.AdapterModel(one, modified_modules=["layer.1"]))
    torch.testing.assert_close(cases.output(model, "bert"), cases.output(plain, "bert"))


def test_a_delta_on_a_layer_in_a_block_is_found() -> None:
    model = backbones.build("bert")
    layer = model.encoder.layer[1]
    model.encoder.layer = nn.ModuleList(map(Block, model.encoder.layer))
    delta = opendelta.LoraModel(layer, modified_modules=["query"])
    assert opendelta.deltas(model) == [delta]
    opendelta.deltas(model)[0].freeze_module()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        n for n, _ in delta.named_parameters()
    }


# --- quantised layers -----------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear whose storage says nothing of what it computes in, as with 4 bits packed in bf16."""

    def __init__(self, linear: nn.Linear, computes_in: torch.dtype, storage: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = computes_in
        self.weight = nn.Parameter(torch.zeros(7, 1).to(storage), requires_grad=False)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.compute_dtype).mean(-1, keepdim=True).expand(*x.shape[:-1], 8).to(x)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("computes_in", [torch.float32, torch.float16])
@pytest.mark.parametrize("method", ["LoraModel", "AdapterModel"])
def test_dtype_is_what_a_quantised_layer_computes_in(
    method: str, computes_in: torch.dtype, storage: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(4, 8).bfloat16(), nn.Linear(8, 8))
    model[1] = Packed(model[1], computes_in, storage)  # type: ignore[arg-type]
    delta = getattr(opendelta, method)(model, modified_modules=["1"])
    assert {p.dtype for p in delta.parameters()} == {computes_in}


def test_quantised_training_needs_a_delta_and_restores_the_flag() -> None:
    model = backbones.build("bert")
    with pytest.raises(InsertionError, match="put one on first"):
        opendelta.quantised_training(model).__enter__()
    LoraModel(model)
    before = dict(vars(model))
    with pytest.raises(KeyError), opendelta.quantised_training(model):
        assert model._hf_peft_config_loaded
        raise KeyError
    assert vars(model) == before and not model._hf_peft_config_loaded


# --- offloaded backbones --------------------------------------------------------------------------


def offloaded(kind: str, folder: Path) -> nn.Module:
    model = backbones.build("llama")
    if kind == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("method", ["LoraModel", "AdapterModel", "ParallelAdapterModel"])
def test_deltas_on_offloaded_backbones(kind: str, method: str, tmp_path: Path) -> None:
    model = offloaded(kind, tmp_path / "weights")
    assert all(p.is_meta for p in model.model.layers.parameters())
    bare = cases.output(model, "llama").detach()
    delta = cases.put(method, "llama", model)
    assert not any(p.is_meta for p in delta.parameters())
    plain = backbones.build("llama")
    for one in (delta, cases.put(method, "llama", plain)):
        cases.randomise(one)
    torch.testing.assert_close(cases.output(model, "llama"), cases.output(plain, "llama"))

    delta.freeze_module()
    cases.loss(model, "llama").backward()
    assert all(p.grad is not None for p in delta.parameters())
    delta.save_finetuned(tmp_path / "delta")
    fresh = backbones.build("llama")
    opendelta.AutoDeltaModel.from_finetuned(tmp_path / "delta", fresh)
    torch.testing.assert_close(cases.output(fresh, "llama"), cases.output(model, "llama"))

    delta.detach()
    torch.testing.assert_close(cases.output(model, "llama"), bare)
    delta.attach()
    assert not any(p.is_meta for p in delta.parameters())
    torch.testing.assert_close(cases.output(model, "llama"), cases.output(plain, "llama"))


@pytest.mark.parametrize("method", ["LoraModel", "AdapterModel", "BitFitModel"])
def test_a_delta_that_is_offloaded_too_is_refused(method: str, tmp_path: Path) -> None:
    model, plain = backbones.build("bert"), backbones.build("bert")
    delta = cases.put(method, "bert", model)
    cases.randomise(delta)
    cases.randomise(cases.put(method, "bert", plain))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    delta.freeze_module()
    with torch.no_grad():
        torch.testing.assert_close(cases.output(model, "bert"), cases.output(plain, "bert"))
    for _ in range(2):
        with pytest.raises(InsertionError, match="Offload the backbone first"):
            cases.loss(model, "bert")
    if method != "BitFitModel":  # whose biases it holds itself
        with pytest.raises(CheckpointError, match="put on after offloading"):
            delta.save_finetuned(tmp_path)
    with pytest.raises(CheckpointError, match="offloaded or on the meta device"):
        opendelta.gen_model_hash(model)


def test_a_trimmed_state_dict_gives_a_meta_backbone_no_weights() -> None:
    model = backbones.build("bert_cls")
    delta = opendelta.LoraModel(model)
    delta.freeze_module(exclude=["deltas", "classifier"])
    trimmed = model.state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*embeddings"):
        model.to("meta").load_state_dict(trimmed, assign=True)


# --- backbones on the meta device -----------------------------------------------------------------

MODELS = ("bert", "t5", "llama")
on_meta = [
    pytest.param(m, b, marks=() if b == "bert" else pytest.mark.slow)
    for m in cases.METHODS
    for b in MODELS
]


def without_values(backbone: str) -> nn.Module:
    """A backbone on the meta device."""
    return backbones.build(backbone).to("meta")


def give(way: str, model: nn.Module, backbone: str, state_dict: dict[str, Tensor]) -> None:
    """Let the backbone have its weights, and the buffers that no state dict holds."""
    if way == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(state_dict, strict=False, assign=way == "assign")
    for name, buffer in backbones.build(backbone).named_buffers():
        place, _, own = name.rpartition(".")
        model.get_submodule(place)._buffers[own] = buffer


@pytest.mark.parametrize(("method", "backbone"), on_meta)
@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_delta_that_was_given_no_values_is_refused(
    method: str, backbone: str, way: str, tmp_path: Path
) -> None:
    """It came while its backbone had none; the order that is told is right."""
    model, plain = without_values(backbone), backbones.build(backbone)
    delta = cases.put(method, backbone, model)
    assert all(p.is_meta for p in delta.parameters())
    give(way, model, backbone, plain.state_dict())
    for _ in range(2):
        with pytest.raises(InsertionError, match="no values.*then construct"):
            cases.output(model, backbone)
    if method in cases.FOLDING:
        with pytest.raises(InsertionError, match="meta device"):
            delta.merge()
    if method != "BitFitModel":  # which has stood in the place of what was loaded
        with delta.detached():
            assert torch.equal(cases.output(model, backbone), cases.output(plain, backbone))
        with pytest.raises(InsertionError, match="no values.*then construct"):
            cases.output(model, backbone)
        delta.remove()
        for one in (model, plain):
            cases.randomise(cases.put(method, backbone, one))
        assert torch.equal(cases.output(model, backbone), cases.output(plain, backbone))


@pytest.mark.parametrize(("method", "backbone"), on_meta)
@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_delta_that_is_given_values_with_the_backbone_acts(
    method: str, backbone: str, way: str
) -> None:
    model, plain = without_values(backbone), backbones.build(backbone)
    cases.put(method, backbone, model)
    cases.randomise(cases.put(method, backbone, plain))
    give(way, model, backbone, {name: t.clone() for name, t in plain.state_dict().items()})
    if (method, backbone) == ("BitFitModel", "bert"):  # nothing says what stands there without it
        with pytest.raises(InsertionError, match="no values.*then construct"):
            cases.output(model, backbone)
        return
    assert torch.equal(cases.output(model, backbone), cases.output(plain, backbone))


def test_values_that_are_written_in_place_or_loaded_count(tmp_path: Path) -> None:
    plain = backbones.build("bert")
    saved = cases.put("LoraModel", "bert", plain)
    cases.randomise(saved)
    saved.save_checkpoint(tmp_path / "w.safetensors")
    bare = backbones.build("bert").state_dict()
    for way in ("by hand", "load_checkpoint"):
        model = without_values("bert")
        delta = cases.put("LoraModel", "bert", model)
        give("to_empty", model, "bert", bare)
        if way == "by hand":
            cases.randomise(delta)
        else:
            delta.load_checkpoint(tmp_path / "w.safetensors")
        assert torch.equal(cases.output(model, "bert"), cases.output(plain, "bert"))


def test_a_backbone_without_values_may_run_on_the_meta_device() -> None:
    model = backbones.build("mlp").to("meta")
    AdapterModel(model, modified_modules=["first"])
    some = torch.empty(2, 6, device="meta")
    assert model(some).is_meta


def test_a_delta_made_on_the_meta_device_on_a_backbone_with_values() -> None:
    for method in ("LoraModel", "AdapterModel"):
        model = backbones.build("bert")
        with torch.device("meta"):
            cases.put(method, "bert", model)
        with pytest.raises(InsertionError, match="no values"):
            cases.output(model, "bert")


class OwnDelta(transformers.BertModel):
    """A model that brings its delta along, as some write it."""

    method = "LoraModel"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        cases.put(self.method, "bert", self)


@pytest.mark.parametrize("method", ["LoraModel", "AdapterModel", "PrefixModel", "CompacterModel"])
def test_a_delta_made_within_from_pretrained(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on the meta device there; what the file lacks gets no values, or transformers'."""
    monkeypatch.setattr(OwnDelta, "method", method)
    bare = backbones.build("bert")
    whole = OwnDelta(bare.config).eval()
    bare.save_pretrained(tmp_path / "bare")
    whole.save_pretrained(tmp_path / "whole")
    loaded = OwnDelta.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(cases.output(loaded, "bert"), cases.output(whole, "bert"))
    loaded = OwnDelta.from_pretrained(tmp_path / "bare").eval()
    if method in ("AdapterModel", "PrefixModel"):  # of layers that transformers gives values to
        assert cases.output(loaded, "bert").abs().max() < 100
    else:
        with pytest.raises(InsertionError, match="within from_pretrained"):
            cases.output(loaded, "bert")


def test_a_prefix_where_relative_positions_are_offloaded() -> None:
    model, plain = backbones.build("t5"), backbones.build("t5")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for one in (model, plain):
        cases.randomise(opendelta.PrefixModel(one))
    torch.testing.assert_close(cases.output(model, "t5"), cases.output(plain, "t5"))


@pytest.mark.parametrize("kind, place", [("bert", "attention"), ("llama", "input_layernorm")])
def test_bitfit_refuses_offloaded_modules(kind: str, place: str) -> None:
    model = backbones.build(kind)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(InsertionError, match="offloaded"):
        opendelta.BitFitModel(model, modified_modules=[place])


# --- weights in eight bits -----------------------------------------------------------------------


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


# --- engines that shard --------------------------------------------------------------------------


def _flatten(model: nn.Module) -> None:
    next(model.parameters())._fsdp_flattened = True  # type: ignore[attr-defined]


def _initialise_zero3(model: nn.Module) -> None:
    model.ds_inflight_param_registry = object()  # type: ignore[assignment]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("engine", "says"), [(_flatten, "FSDP1.*fully_shard"), (_initialise_zero3, "ZeRO-3.*first")]
)
def test_engines_that_take_no_more_parameters(method: str, engine: Any, says: str) -> None:
    model = backbones.build("bert")
    engine(model)
    with unchanged(model), pytest.raises(InsertionError, match=says):
        put(method, "bert", model)


@pytest.mark.parametrize("act", ["save_finetuned", "save_checkpoint", "load_checkpoint"])
def test_a_flattened_backbone_saves_and_loads_nothing(act: str, tmp_path: Path) -> None:
    model = backbones.build("bert")
    delta = LoraModel(model)
    delta.save_finetuned(tmp_path / "saved")
    before = {file: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    _flatten(model)
    with pytest.raises(InsertionError, match="FSDP1"):
        getattr(delta, act)(tmp_path / "saved")
    assert before == {file: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
