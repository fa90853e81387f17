"""Constructing a delta: what is refused, in words, with the backbone exactly as it was."""

from __future__ import annotations

from typing import Any

import backbones
import pytest
from placed import unchanged

from opendelta import LoraModel
from opendelta.exceptions import AddressingError, ConfigError

# --- values of the wrong kind --------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank_pattern": {"query": "8"}},
        {"rank_pattern": {"query": 2.5}},
        {"rank_pattern": {"query": True}},
        {"rank_pattern": {"query": 0}},
        {"rank_pattern": {1: 2}},
        {"rank_pattern": ["query"]},
        {"alpha_pattern": {"query": float("nan")}},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"modified_modules": []},
        {"modified_modules": ()},
        {"modified_modules": [3]},
    ],
    ids=str,
)
def test_bad_values_name_the_argument(arguments: dict[str, Any]) -> None:
    """A value of the wrong kind is refused before the backbone is touched."""
    model = backbones.build("bert")
    arguments = {"modified_modules": ["query"], **arguments}
    (name,) = {k for k in arguments if k != "modified_modules"} or {"modified_modules"}
    word = {"rank_pattern": "rank_pattern|lora_r", "alpha_pattern": "lora_alpha"}.get(name, name)
    with unchanged(model), pytest.raises((ConfigError, AddressingError), match=word):
        LoraModel(model, **arguments)
