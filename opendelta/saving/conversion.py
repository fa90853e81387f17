"""From one format of a saved delta to another: torch's files, safetensors, PEFT's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opendelta.auto_delta import AutoDeltaConfig, AutoDeltaModel, model_class_for
from opendelta.center.contents import FILES, check_weights, expected_files
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.exceptions import CheckpointError, ConfigError
from opendelta.ground.files import (
    SAFETENSORS_FILE,
    TORCH_FILE,
    read_tensors,
    resolve_folder,
    weights_in,
    write_tensors,
)
from opendelta.saving.model_folder import load_backbone
from opendelta.saving.peft_files import CONFIG_FILE as PEFT_CONFIG_FILE

FORMATS = ("safetensors", "bin", "peft")


def write_converted(
    source: Path,
    target: Path,
    to: str | None = None,
    model: str | None = None,
    class_name: str | None = None,
) -> None:
    """Write the delta in `source` into `target`, in another format.

    Args:
        source: a delta's folder, a PEFT adapter's, or a file of tensors.
        target: a folder; for a file a file, whose suffix says the format.
        to: one of `FORMATS`, for folders; None for safetensors.
        model: folder of the backbone with its weights, for PEFT.
        class_name: its class in transformers, see `load_backbone`.

    Raises:
        CheckpointError: if the source is missing, damaged, or in that format already.
        ConfigError: if the backbone is needed and not given, or PEFT has no such method.
    """
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
        delta = AutoDeltaModel.from_peft(source, _backbone(model, class_name))
        delta.save_finetuned(target, save_function=torch.save if to == "bin" else None)
    elif to == "peft":
        config = AutoDeltaConfig.from_finetuned(resolve_folder(source))
        model_class: Any = model_class_for(config)
        if not hasattr(model_class, "export_peft"):
            raise ConfigError(f"{source} holds a {config.delta_type!r} delta, which PEFT has not.")
        backbone = _backbone(model, class_name or config.backbone_class)
        model_class.from_finetuned(source, backbone).export_peft(target)
    else:
        _save_anew(resolve_folder(source), target, TORCH_FILE if to == "bin" else SAFETENSORS_FILE)


def require_new(target: Path) -> None:
    """Refuse to mix what is written with what is there.

    Raises:
        CheckpointError: if `target` exists and is not an empty folder.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; name one that does not.")


def read_weights(folder: Path, config: BaseDeltaConfig) -> tuple[str, dict[str, Tensor]]:
    """The weights file's name and the tensors of a saved delta.

    Raises:
        CheckpointError: if they are missing, damaged, or not those whose sha256 the config holds.
    """
    values, present = config.to_dict(), [n for n in FILES if (folder / n).is_file()]
    expected_files(values, present, str(folder))
    check_weights(values, folder)
    file = weights_in(folder, config.weights_file)
    return file.name, read_tensors(file)


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
