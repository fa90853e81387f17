"""A soft prompt made of real tokens, on every architecture that takes ids."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import prompting
import tiny


@pytest.mark.sweep
def test_it_is_right_or_refused_on_every_architecture() -> None:
    found = prompting.sweep(tiny.model_types())
    kinds = Counter(verdict.kind for verdict in found.values())
    silent = {name: v for name, v in found.items() if v.kind in ("wrong", "failed")}
    assert not silent
    assert kinds["right"] >= 300 and kinds["refused"] <= 0.02 * kinds["right"], kinds


# Models that do more with ids than to embed them: scaling and masking, rows of further embeddings,
# positions found from ids, an encoder of its own name, attention that takes tokens by the block.
@pytest.mark.parametrize(
    "model_type",
    ["bert", "esm", "gemma3n_text", "roberta", "mpnet", "qwen2_vl", "fsmt", "seamless_m4t", "mra"],
)
def test_it_is_right_where_models_read_ids(model_type: str) -> None:
    verdict = prompting.judge(model_type)
    assert verdict.kind == "right", verdict


@pytest.mark.parametrize(
    ("model_type", "why"), [("canine", "is given others"), ("ibert", "returns a tuple")]
)
def test_what_cannot_be_right_is_refused_by_name(model_type: str, why: str) -> None:
    verdict = prompting.judge(model_type)
    assert verdict.kind == "refused" and why in verdict.why, verdict
