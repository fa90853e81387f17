"""``opendelta convert``: between torch's files, safetensors, and PEFT's folders."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opendelta.auto_delta import AutoDeltaConfig, AutoDeltaModel, model_class_for
from opendelta.cli.backbone import load_backbone
from opendelta.cli.info import read_weights
from opendelta.cli.shared import require_new
from opendelta.exceptions import CheckpointError, ConfigError
from opendelta.ground.files import (
    SAFETENSORS_FILE,
    TORCH_FILE,
    delta_folder,
    read_tensors,
    write_tensors,
)
from opendelta.saving.peft_files import CONFIG_FILE as PEFT_CONFIG_FILE


def run_convert(asked: argparse.Namespace) -> None:
    """Write a delta in another format; prints where.

    Raises:
        CheckpointError: if the source is missing, damaged, or in that format already.
        ConfigError: if the backbone is needed and not given, or PEFT has no such method.
    """
    source, target, to = Path(asked.source), Path(asked.target), asked.to
    require_new(target)
    if source.is_file():
        if to is not None or target.suffix not in (".safetensors", ".bin", ".pt"):
            raise CheckpointError(
                f"{source} is a file, so the target's suffix says the format: expected a name "
                f"that ends in .safetensors, .bin or .pt, and no --to; got {str(target)!r}."
            )
        write_tensors(target, _apart(read_tensors(source)))
    elif (source / PEFT_CONFIG_FILE).is_file():
        if to == "peft":
            raise CheckpointError(f"{source} is PEFT's already; --to safetensors makes it ours.")
        delta = AutoDeltaModel.from_peft(source, _backbone(asked.model, asked.model_class))
        delta.save_finetuned(target, save_function=torch.save if to == "bin" else None)
    elif to == "peft":
        config = AutoDeltaConfig.from_finetuned(delta_folder(source))
        method = model_class_for(config)
        if not hasattr(method, "peft_types"):
            raise ConfigError(f"{source} holds a {config.delta_type!r} delta, which PEFT has not.")
        backbone = _backbone(asked.model, asked.model_class or config.backbone_class)
        method.from_finetuned(source, backbone).export_peft(target)
    else:
        _save_anew(delta_folder(source), target, TORCH_FILE if to == "bin" else SAFETENSORS_FILE)
    print(target)


def _save_anew(source: Path, target: Path, name: str) -> None:
    """The same tensors in a file called `name`, with a config that vouches for it."""
    config = AutoDeltaConfig.from_finetuned(source)
    file, tensors = read_weights(source, config)
    if file == name:
        raise CheckpointError(f"{source} holds {name} already; --to names another format.")
    config.weights_sha256 = write_tensors(target / name, _apart(tensors))
    config.weights_file = name
    config.save_finetuned(target)


def _backbone(model: str | None, class_name: str | None) -> PreTrainedModel:
    if model is None:
        raise ConfigError(
            "To and from PEFT, the backbone is needed too: the files do not say of which kind the "
            "modified modules are, nor what the backbone's hash is. Add --model MODEL_DIR, the "
            "folder with its config.json and weights."
        )
    return load_backbone(model, class_name)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without shared memory, which torch's files can hold and safetensors cannot."""
    return {name: tensor.clone() for name, tensor in tensors.items()}
