"""Loading a delta's files: who may, what overrides, and files that are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import built
from pieces import parameter_names

import opendelta
from opendelta import LoraModel
from opendelta.exceptions import CheckpointError

# --- bad backbones -------------------------------------------------------------------------------


def test_nothing_is_loaded_onto_a_backbone_without_storage(tmp_path: Path) -> None:
    """On the meta device weights would vanish: loading says so and puts nothing on."""
    source, delta = built("LoraModel", "bert")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    with torch.device("meta"):
        empty = type(source)(source.config)
    before = parameter_names(empty)
    for check_hash in (True, False):
        with pytest.raises(CheckpointError, match="meta"):
            LoraModel.from_finetuned(tmp_path, backbone_model=empty, check_hash=check_hash)
        assert parameter_names(empty) == before
        assert opendelta.deltas(empty) == []
