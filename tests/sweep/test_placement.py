"""The defaults' placement on every architecture that builds at full size, and beside PEFT's."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import placement
import tiny

from opendelta.addressing.common_structure import CommonStructureMap

# What PEFT's defaults reach besides queries and values of the tower's own attention: attention to
# an encoder, another tower, feed-forwards, keys and output projections.
MORE = re.compile(
    r"EncDecAttention|encoder_attn|vision_model|feed_forward|\.(fc1|fc2|k_proj|o_proj|key|output)$"
)


@pytest.mark.sweep
def test_defaults_reach_nearly_every_architecture() -> None:
    figures = placement.summary(placement.measure(tiny.model_types()))
    assert figures["built"] > 550
    assert figures["built"] - figures["LoRA placed"] <= 15
    assert figures["on attention, q and v in every unit"] >= 505
    assert figures["on attention"] - figures["on attention, q and v in every unit"] <= 40


def peft_targets(model: nn.Module, targets: list[str] | str) -> set[str]:
    """The modules that PEFT's ``target_modules`` reach."""
    names = {name for name, _ in model.named_modules()}
    if isinstance(targets, str):
        return {name for name in names if re.fullmatch(targets, name)}
    return {n for n in names if any(n == t or n.endswith("." + t) for t in targets)}


@pytest.mark.sweep
def test_queries_and_values_are_those_of_pefts_defaults() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    compared = 0
    for model_type in set(DEFAULTS) & set(tiny.model_types()):
        model = tiny.default_size(model_type)
        structure = CommonStructureMap(model)
        ours = {*structure.addressed("attn.q"), *structure.addressed("attn.v")}
        theirs = {n for n in peft_targets(model, DEFAULTS[model_type]) if not MORE.search(n)}
        assert theirs <= ours, model_type
        # The input projection of a state-space mixer is one of ours where there is no attention.
        assert all(name.endswith("mixer.in_proj") for name in ours - theirs), model_type
        compared += 1
    assert compared >= 30
