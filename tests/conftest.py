"""What all tests share: the golden folder on the path, one thread, fixed seeds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# What random inputs are tried on the properties: some half a minute in all, the same each time.
settings.register_profile("fixed", max_examples=500, deadline=None, derandomize=True, database=None)
settings.load_profile("fixed")

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=[False, True], ids=["bare", "carrying"])
def model(request: pytest.FixtureRequest) -> Any:
    """A classifier that a call with bad arguments must leave alone, bare or with deltas on it."""
    from placed import classifier

    return classifier(request.param)
