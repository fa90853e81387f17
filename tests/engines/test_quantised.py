"""Deltas on quantised backbones: bitsandbytes (4 and 8 bits), torchao and optimum-quanto (int8).

The tiny LLaMA's linears are quantised by the packages' own code, on the CPU.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from torch import Tensor, nn

import opendelta
from opendelta import AutoDeltaModel, LoraModel
from opendelta.exceptions import BackboneMismatchWarning, DeltaWarning, InsertionError

pytestmark = pytest.mark.engines

IDS = torch.arange(8).view(2, 4) + 3
KINDS = ("bitsandbytes 4", "bitsandbytes 8", "torchao", "quanto")
METHODS: dict[str, dict[str, Any]] = {
    "LoraModel": {},
    "DoraModel": {},
    "IA3Model": {},
    "AdapterModel": {},
    "LowRankAdapterModel": {},
    "CompacterModel": {"reduction_factor": 4},
    "ParallelAdapterModel": {},
}


def bitsandbytes(linear: nn.Linear, bits: int) -> nn.Module:
    import bitsandbytes.nn as bnb

    sizes = linear.in_features, linear.out_features
    made: Any
    if bits == 4:
        made = bnb.Linear4bit(*sizes, bias=False, compute_dtype=linear.weight.dtype)
        made.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, module=made)
    else:
        made = bnb.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        made.weight = bnb.Int8Params(linear.weight.data, requires_grad=False)
    return made.to("cpu")  # which quantises


def quantised(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny LLaMA with the linears of its blocks quantised."""
    model = backbones.build("llama").to(dtype)
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model.model, Int8WeightOnlyConfig())
    elif kind == "quanto":
        from optimum.quanto import freeze, qint8, quantize

        quantize(model.model, weights=qint8)
        freeze(model.model)
    else:
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(part, name, bitsandbytes(child, int(kind[-1])))
    return model


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=IDS).logits
    return logits


def train(model: nn.Module, steps: int = 5) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_trains_saves_and_loads(kind: str, method: str, tmp_path: Path) -> None:
    model = quantised(kind)
    delta = getattr(opendelta, method)(model, **METHODS[method])
    delta.freeze_module()
    losses = train(model)
    assert losses[-1] < losses[0] - 0.2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in delta.parameters())

    delta.save_finetuned(tmp_path)
    fresh = quantised(kind).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackboneMismatchWarning)
        AutoDeltaModel.from_finetuned(tmp_path, fresh)
    torch.testing.assert_close(output(fresh), output(model))
    assert not torch.allclose(output(model), output(quantised(kind).eval()), atol=1e-2)
    with delta.detached():
        torch.testing.assert_close(output(model), output(quantised(kind).eval()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_compute_dtype(kind: str, dtype: torch.dtype) -> None:
    delta = LoraModel(quantised(kind, dtype))
    assert {p.dtype for p in delta.parameters()} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused(kind: str) -> None:
    model = quantised(kind).eval()
    delta = LoraModel(model)
    before = output(model)
    with pytest.raises(InsertionError, match="quantised"):
        delta.merge()
    torch.testing.assert_close(output(model), before)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_hash_tells_quantised_backbones_apart(kind: str, number: int) -> None:
    def hash_of(model: nn.Module) -> str:
        return opendelta.gen_model_hash(model, format=number)

    model, other = quantised(kind), quantised(kind)
    assert hash_of(model) == hash_of(other)
    LoraModel(model)
    assert hash_of(model) == hash_of(other)
    changed = backbones.build("llama")
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "build", lambda name: changed)
        assert hash_of(quantised(kind)) != hash_of(other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_leaves_format_2_as_it_is(kind: str) -> None:
    model = quantised(kind).eval()
    output(model)
    model.state_dict()  # unpacks what bitsandbytes repacked on some CPUs
    hashes = [opendelta.gen_model_hash(m, format=2) for m in (model, quantised(kind))]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(("kind", "part"), [("torchao", "scale"), ("quanto", "_scale")])
def test_scales_count_in_format_2(kind: str, part: str) -> None:
    model: Any = quantised(kind)
    first = opendelta.gen_model_hash(model, format=2)
    with torch.no_grad():
        getattr(model.model.layers[0].mlp.up_proj.weight, part)[0] += 1
    assert opendelta.gen_model_hash(model, format=2) != first


# --- bitsandbytes' repacking ----------------------------------------------------------------------


def repacked(p: Any) -> bool:
    return getattr(p.quant_state, "packing_format_for_cpu", False)


@pytest.fixture
def evaluated() -> nn.Module:
    """A 4-bit backbone with LoRA after an evaluation in which its weights were repacked."""
    import bitsandbytes.functional as F

    model = quantised("bitsandbytes 4").eval()
    LoraModel(model).freeze_module()
    output(model)
    weights = [p for p in model.parameters() if hasattr(p, "quant_state")]
    if not F.has_avx512bf16():  # where the CPU has no such kernels: what is done for them
        for p in weights:
            p.data, _ = F._convert_weight_packed_for_cpu(p.data, p.quant_state)
    assert all(map(repacked, weights))
    return model


def test_training_on_repacked_weights_warns_of_the_lost_gradients(evaluated: nn.Module) -> None:
    evaluated.train()
    with pytest.warns(DeltaWarning, match=r"model.state_dict\(\)"):
        evaluated(input_ids=IDS, labels=IDS)


def test_evaluating_on_repacked_weights_warns_of_nothing(evaluated: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeltaWarning)
        output(evaluated)
        output(evaluated.train())


def test_the_cure_that_the_warning_names(evaluated: nn.Module) -> None:
    evaluated.state_dict()
    evaluated.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeltaWarning)
        evaluated(input_ids=IDS, labels=IDS).loss.backward()
    (delta,) = opendelta.deltas(evaluated)
    assert all(p.grad is not None for p in delta.parameters())


def test_repacked_weights_are_not_hashed(evaluated: nn.Module, tmp_path: Path) -> None:
    (delta,) = opendelta.deltas(evaluated)
    delta.save_finetuned(tmp_path / "packed")
    assert delta.config.backbone_hash is None
    evaluated.state_dict()
    delta.save_finetuned(tmp_path / "unpacked")
    whole = quantised("bitsandbytes 4")
    assert delta.config.backbone_hash == opendelta.gen_model_hash(whole, format=2)


# --- transformers' Trainer ------------------------------------------------------------------------


def test_lora_on_4_bits_in_the_trainer(tmp_path: Path) -> None:
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        Trainer,
        TrainingArguments,
    )

    backbones.build("llama").save_pretrained(tmp_path / "backbone")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "backbone", quantization_config=config, device_map={"": "cpu"}
    )
    delta = LoraModel(model)
    delta.freeze_module()
    before = {name: p.detach().clone() for name, p in delta.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments, train_dataset=data)
    with opendelta.quantised_training(model):
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in delta.named_parameters())

    model.eval()
    delta.save_finetuned(tmp_path / "delta")
    with delta.detached():
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map={"": "cpu"}).eval()
    with delta.detached():
        torch.testing.assert_close(output(again), output(model))
    AutoDeltaModel.from_finetuned(tmp_path / "delta", again)
    torch.testing.assert_close(output(again), output(model))


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    page = Path(__file__).parents[2] / "docs" / "quantised.md"
    blocks = re.findall(r"^```py\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    backbones.build("llama").save_pretrained("some/model")
    names: dict[str, Any] = {
        "arguments": TrainingArguments("run", max_steps=2, use_cpu=True, report_to=[]),
        "data": [{"input_ids": ids, "labels": ids} for ids in IDS],
        "evaluate": output,
    }
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    model, delta = names["model"], names["delta"]
    weights = [p for p in model.parameters() if hasattr(p, "quant_state")]
    assert weights and model.training and not any(map(repacked, weights))
    assert all(p.abs().sum() > 0 for name, p in delta.named_parameters() if "lora_B" in name)
