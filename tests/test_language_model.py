"""Deltas on a real language model: SmolLM2-135M, a LLaMA with grouped queries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from language_models import smollm2

from opendelta import PrefixModel

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_a_prefix_generates_the_same_with_and_without_a_cache(beams: int) -> None:
    model, tokenizer = smollm2()
    ids = tokenizer("The sea is", return_tensors="pt").input_ids
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 10,
        "num_beams": beams,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
    }
    bare = model.generate(ids, **options)
    delta = PrefixModel(model, prefix_token_num=6, reparameterize=False)
    for p in delta.parameters():
        torch.nn.init.normal_(p, std=1.0)
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert not torch.equal(cached, bare)
    delta.detach()
    assert torch.equal(model.generate(ids, **options), bare)


def test_it_learns_to_speak_like_a_pirate(tmp_path: Path) -> None:
    script = ROOT / "examples" / "tutorial" / "5_language_model.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before = re.findall(r"before: (.*)", done.stdout)
    after = re.findall(r"after:  (.*)", done.stdout)
    assert len(before) == len(after) == 2
    assert not any("matey" in text for text in before)
    assert all(text.startswith("Arr, matey!") for text in after)
    assert "moon" in after[0] and "Berlin" in after[1]  # about what was asked, never trained on
