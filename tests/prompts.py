"""What the tests of soft prompts share: tiny backbones with a prompt, and what it must be like."""

from __future__ import annotations

from typing import Any

import backbones
import torch
import transformers
import weights
from cases import randomise
from torch import Tensor, nn

from opendelta import SoftPromptModel

COUNT = 5
ENCODERS = ("bert", "roberta", "distilbert", "deberta")
DECODERS = ("gpt2", "opt", "llama")
PAIRS = ("t5", "bart")
FAMILIES = (*ENCODERS, *DECODERS, *PAIRS)
GENERATING = (*DECODERS, "t5", "bart_lm")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "max_position_embeddings": 66,
}


def build(family: str) -> nn.Module:
    if family == "bart_lm":
        config = backbones.build("bart").config
        return weights.fill(transformers.BartForConditionalGeneration(config)).eval()
    return backbones.build(family)


def prompted(family: str, **kwargs: Any) -> tuple[nn.Module, SoftPromptModel]:
    model = build(family)
    delta = SoftPromptModel(model, soft_token_num=COUNT, **kwargs)
    randomise(delta, 0.5)
    return model, delta


def the_prompt(delta: SoftPromptModel) -> Tensor:
    (prompt,) = delta.parameters()
    return prompt


def run(model: nn.Module, family: str) -> Tensor:
    return backbones.run(model, "bart" if family == "bart_lm" else family)


def close(actual: Tensor, expected: Tensor, within: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < within * max(1.0, float(expected.detach().abs().max()))


def joined(bare: Any, prompt: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """What the bare model must be given to compute what the prompted one does with `given`."""
    given = dict(given)
    ids = given.pop("input_ids")
    source = bare.get_encoder() if bare.config.is_encoder_decoder else bare
    embeds = source.get_input_embeddings()(ids)
    padding = (given.get("attention_mask", torch.ones_like(ids)).cumsum(1) == 0).sum(1).tolist()

    def put(values: Tensor, own: Any) -> Tensor:
        """Right before the text of each row, after the padding on its left."""
        rows = []
        for row, left in zip(values, padding, strict=True):
            new = own if isinstance(own, Tensor) else row.new_full((COUNT, *row.shape[1:]), own)
            rows.append(torch.cat([row[:left], new, row[left:]]))
        return torch.stack(rows)

    given["inputs_embeds"] = put(embeds, prompt.detach())
    for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("labels", -100)):
        if name in given:
            given[name] = put(given[name], value)
    return given


def first(out: Any) -> Tensor:
    return out.logits if "logits" in out else out.last_hidden_state


def prompt_of(family: str) -> dict[str, Any]:
    ids = backbones.inputs("gpt2")["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0, "do_sample": False}
