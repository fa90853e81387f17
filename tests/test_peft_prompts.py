"""PEFT's files of prompts: read and written, against PEFT in the same process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backbones
import peft
import pytest
import torch
import transformers
import weights
from cases import randomise
from prompts import COUNT, close, the_prompt
from torch import Tensor, nn

from opendelta import AutoDeltaModel, SoftPromptModel
from opendelta.exceptions import CheckpointError, ConfigError

CONFIGS: dict[str, Any] = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=COUNT),
    "mlp": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=COUNT, encoder_hidden_size=8
    ),
    "lstm": lambda task: peft.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=COUNT,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
    ),
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert_cls": "SEQ_CLS"}


def build(name: str) -> Any:
    if name == "gpt2":
        model = transformers.GPT2LMHeadModel(backbones.build("gpt2").config)
        return weights.fill(model).eval()
    return backbones.build(name)


def logits(model: nn.Module, name: str) -> Tensor:
    given = backbones.inputs(name)
    with torch.no_grad():
        found: Tensor = model(input_ids=given["input_ids"]).logits
    return found


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", TASKS)
def test_a_file_of_pefts_is_read(name: str, kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(name), CONFIGS[kind](TASKS[name])).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    expected = logits(theirs, name)
    theirs.save_pretrained(str(tmp_path))
    model = build(name)
    delta = AutoDeltaModel.from_peft(tmp_path, model)
    assert isinstance(delta, SoftPromptModel) and delta.soft_token_num == COUNT
    close(logits(model, name), expected, within=1e-5)
    delta.detach()
    close(logits(model, name), logits(build(name), name), within=0.0 + 1e-9)


@pytest.mark.parametrize("reparameterize", [False, "mlp"])
@pytest.mark.parametrize("name", TASKS)
def test_peft_reads_what_is_written(name: str, reparameterize: Any, tmp_path: Path) -> None:
    model = build(name)
    delta = SoftPromptModel(model, COUNT, reparameterize=reparameterize, mid_dim=8)
    randomise(delta, 0.3)
    delta.freeze_module()
    delta.export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), str(tmp_path)).eval()
    close(logits(theirs, name), logits(model, name), within=1e-5)
    again = build(name)
    AutoDeltaModel.from_peft(tmp_path, again)
    close(logits(again, name), logits(model, name), within=1e-5)


def test_prompts_of_encoder_and_decoder_are_refused(tmp_path: Path) -> None:
    model = backbones.build("t5")
    config = CONFIGS["prompt"]("SEQ_2_SEQ_LM")
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="num_transformer_submodules=2"):
        AutoDeltaModel.from_peft(tmp_path, backbones.build("t5"))


def test_files_that_are_none(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build("bert_cls"), CONFIGS["prompt"]("SEQ_CLS"))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="'classifier"):
        AutoDeltaModel.from_peft(tmp_path, backbones.build("llama"))


def test_heads_go_along(tmp_path: Path) -> None:
    model = build("bert_cls")
    delta = SoftPromptModel(model, COUNT)
    delta.freeze_module(exclude=["deltas", "classifier"])
    with torch.no_grad():
        model.classifier.weight.add_(0.5)
    delta.export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("bert_cls"), str(tmp_path)).eval()
    close(logits(theirs, "bert_cls"), logits(model, "bert_cls"), within=1e-5)


def test_what_else_was_trained_is_not_left_out(tmp_path: Path) -> None:
    model = build("bert_cls")
    delta = SoftPromptModel(model, COUNT)
    delta.freeze_module(exclude=["deltas", "pooler"])
    with pytest.raises(ConfigError, match="pooler"):
        delta.export_peft(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_model_of_no_task_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2))
    delta = SoftPromptModel(model, 2)
    delta.freeze_module()
    with pytest.raises(ConfigError, match="Sequential"):
        delta.export_peft(tmp_path / "x")
    assert the_prompt(delta).shape == (2, 4)
