"""Each method's defaults on every architecture that runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import sweep
import tiny

# On how many architectures a method may fail: so many, or such a share of those it applies to.
ALLOWED = {
    "lora": 10,
    "adapter": 15,
    "low_rank_adapter": 15,
    "compacter": 15,
    "parallel_adapter": 15,
    "bitfit": 15,
    "prefix": 0.1,
    "soft_prompt": 0.05,
}


@pytest.mark.sweep
def test_defaults_work_on_nearly_every_architecture() -> None:
    found = sweep.sweep(tiny.model_types())
    assert len(found) >= 280
    too_many = {}
    for method, allowed in ALLOWED.items():
        applicable = sum(method in results for results in found.values())
        failed = sweep.failures(found, method)
        if len(failed) > (allowed if allowed >= 1 else allowed * applicable):
            too_many[method] = failed
    assert not too_many


@pytest.mark.parametrize("method", sweep.METHODS)
def test_a_column_fails_where_it_should(method: str) -> None:
    inputs = tiny.batch(tiny.backbone("bert"))
    assert not any(sweep.Trial("bert", method, inputs).result().values())
    trial = sweep.Trial("bert", method, inputs)
    trial.placed()
    trial.delta.detach()
    assert trial.alive() == "the output stays the same"
    assert trial.gradients() == "no output has a gradient"
    trial.model.requires_grad_(True)
    assert "no gradient in" in (trial.gradients() or "")
    trial.bare = [2 * tensor for tensor in trial.bare]
    assert trial.detach_attach() == "detached, the output is not the bare one"
