"""What the tests of files share: a delta that has something to save, and one that was loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import backbones
import torch
import weights
from cases import randomise
from placed import place

from opendelta import AutoDeltaModel, DeltaBase


def trained(method: str, backbone: str, exclude: Any = None, **kwargs: Any) -> DeltaBase:
    """A delta with weights of its own, after `freeze_module`; so has what it left trainable."""
    delta = place(method, backbone, **kwargs)
    randomise(delta)
    delta.freeze_module(exclude=exclude)
    own = {id(p) for p in delta.parameters()}
    with torch.no_grad():
        for name, p in delta.backbone_model.named_parameters():
            if p.requires_grad and id(p) not in own:
                p.copy_(weights.uniform("trained:" + name, p.shape, 0.25))
    return delta


def output(delta: DeltaBase, backbone: str) -> torch.Tensor:
    return backbones.run(delta.backbone_model.eval(), backbone)


def names(delta: DeltaBase) -> set[str]:
    return {name for name, _ in delta.named_parameters()}


def loaded(path: Path, backbone: str, **kwargs: Any) -> DeltaBase:
    """The delta in a folder on a fresh backbone; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoDeltaModel.from_finetuned(
            path, backbone_model=backbones.build(backbone), **kwargs
        )


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() if p.is_file() else b"a folder" for p in folder.iterdir()}
