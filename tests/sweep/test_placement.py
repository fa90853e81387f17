"""The defaults' placement on every architecture that builds at full size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import placement
import tiny


@pytest.mark.sweep
def test_defaults_reach_nearly_every_architecture() -> None:
    figures = placement.summary(placement.measure(tiny.model_types()))
    assert figures["built"] > 550
    assert figures["built"] - figures["LoRA placed"] <= 15
    assert figures["on attention, q and v in every unit"] >= 505
    assert figures["on attention"] - figures["on attention, q and v in every unit"] <= 40
