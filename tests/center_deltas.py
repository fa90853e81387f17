"""Small saved deltas to push and pull, and what the tests of the centers ask about them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import torch
from cases import randomise
from placed import place

from opendelta import DeltaBase

NAME = "alice/sentiment"


def saved(folder: Path, seed: int = 0, method: str = "LoraModel") -> DeltaBase:
    """A real delta with weights of its own, saved into `folder`."""
    torch.manual_seed(seed)
    delta = place(method, "mlp")
    randomise(delta)
    with torch.no_grad():
        next(delta.parameters()).add_(seed)
    delta.freeze_module()
    delta.save_finetuned(folder)
    return delta


def written(folder: Path, seed: int, size: int = 2_000_000, weights: bytes | None = None) -> Path:
    """Files that look like a delta with large weights, made without torch."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random.Random(seed).randbytes(size) if weights is None else weights
    config = {
        "delta_type": "lora",
        "lora_r": seed + 1,
        "weights_file": "model.safetensors",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(f"# version {seed}\n")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
