"""A backbone from the folder that `save_pretrained` wrote; code that lies in it is never run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from opendelta.exceptions import CheckpointError, ConfigError, nearest
from opendelta.ground.files import CONFIG_FILE


def build_backbone(
    folder: str | os.PathLike[str], class_name: str | None = None
) -> PreTrainedModel:
    """The backbone on the meta device: its structure, without memory for weights.

    Args:
        folder: with the backbone's ``config.json``; nothing else is read.
        class_name: a class of transformers; None for the one that the config names.

    Raises:
        CheckpointError: if there is no such folder, or transformers cannot build from it.
        ConfigError: if the class is not one of transformers' models.
    """
    config = _config_in(Path(folder))
    model_class = _model_class(config, class_name, Path(folder))
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # of any kind: each architecture trips over its own fields
        raise CheckpointError(
            f"{model_class.__name__} cannot be built from {Path(folder) / CONFIG_FILE}: {error}"
        ) from error


def load_backbone(folder: str | os.PathLike[str], class_name: str | None = None) -> PreTrainedModel:
    """The backbone with its weights, on the CPU.

    Args and errors are those of `build_backbone`; the folder must hold the weights too.
    """
    config = _config_in(Path(folder))
    model_class = _model_class(config, class_name, Path(folder))
    try:
        return model_class.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any kind: a damaged file, a config that does not fit it
        raise CheckpointError(
            f"The weights of {model_class.__name__} cannot be loaded from {folder}: {error}"
        ) from error


def _config_in(folder: Path) -> PreTrainedConfig:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"There is no {file}. A backbone is named by the folder that save_pretrained wrote; "
            f"`hf download NAME --local-dir FOLDER` gets one from the Hub ({CONFIG_FILE} is "
            "enough to draw its tree)."
        )
    try:
        if "delta_type" in json.loads(file.read_text(encoding="utf-8")):
            raise CheckpointError(f"{file} is the config of a delta; name its backbone's folder.")
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # of any kind: whatever is not as transformers expects it
        raise CheckpointError(
            f"transformers cannot read {file}, and code that comes with a model is not run: {error}"
        ) from error
    config._attn_implementation = "eager"  # a config may name a kernel to download
    return config


def _model_class(
    config: PreTrainedConfig, class_name: str | None, folder: Path
) -> type[PreTrainedModel]:
    named = class_name or next(iter(config.architectures or ()), None)
    if named is None:
        raise ConfigError(
            f"{folder / CONFIG_FILE} names no class under 'architectures'; say which with --class, "
            "such as --class BertModel."
        )
    found = getattr(transformers, str(named), None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    raise ConfigError(
        f"{named!r} is not a model of transformers, and code from elsewhere is not run."
        + nearest(str(named), dir(transformers))
        + " --class says which class to take."
    )
