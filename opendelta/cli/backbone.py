"""``opendelta tree`` and ``select``, and the backbones that commands name by their folder.

That is the folder that `save_pretrained` wrote; code that lies in it is never run.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from opendelta.delta.registry import model_class_for
from opendelta.exceptions import CheckpointError, ConfigError, nearest
from opendelta.ground.files import CONFIG_FILE
from opendelta.inspection import Visualization
from opendelta.web import select_modules


def run_tree(asked: argparse.Namespace) -> None:
    """Draw a backbone that is known by its config alone."""
    Visualization(build_backbone(asked.model, asked.model_class)).structure_graph(
        common_structure=asked.common or asked.only_common,
        only_common=asked.only_common,
        expand_params=asked.params,
        keep_non_params=asked.all,
    )


def run_select(asked: argparse.Namespace) -> None:
    """Choose modules in a web page, which counts what a method would add there."""
    backbone = build_backbone(asked.model, asked.model_class)
    method: Any = asked.method and model_class_for({"delta_type": asked.method})

    def count(names: list[str]) -> tuple[int, float]:
        plan = method.preview(backbone, modified_modules=[f"[r]^{re.escape(n)}" for n in names])
        return plan.num_parameters, plan.share

    select_modules(backbone, asked.port, method=asked.method, count=count if method else None)


def build_backbone(folder: str, class_name: str | None) -> PreTrainedModel:
    """The backbone on the meta device: its structure, without memory for weights.

    Args:
        folder: with the backbone's ``config.json``; nothing else is read.
        class_name: a class of transformers; None for the one that the config names.

    Raises:
        CheckpointError: if there is no such folder, or transformers cannot build from it.
        ConfigError: if the class is not one of transformers' models.
    """
    config, model_class = _described(Path(folder), class_name)
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # of any kind: each architecture trips over its own fields
        raise CheckpointError(
            f"{model_class.__name__} cannot be built from {Path(folder) / CONFIG_FILE}: {error}"
        ) from error


def load_backbone(folder: str, class_name: str | None) -> PreTrainedModel:
    """The backbone with its weights, on the CPU.

    Args and errors are those of `build_backbone`; the folder must hold the weights too.
    """
    config, model_class = _described(Path(folder), class_name)
    try:
        return model_class.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any kind: a damaged file, a config that does not fit it
        raise CheckpointError(
            f"The weights of {model_class.__name__} cannot be loaded from {folder}: {error}"
        ) from error


def _described(
    folder: Path, class_name: str | None
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config in a folder, and the class that it or the user names."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"There is no {file}. A backbone is named by the folder that save_pretrained wrote; "
            f"`hf download NAME --local-dir FOLDER` gets one from the Hub ({CONFIG_FILE} is "
            "enough to draw its tree)."
        )
    try:
        of_delta = "delta_type" in json.loads(file.read_text(encoding="utf-8"))
        safely = {"local_files_only": True, "trust_remote_code": False}
        config = None if of_delta else AutoConfig.from_pretrained(folder, **safely)
    except Exception as error:  # of any kind: whatever is not as transformers expects it
        raise CheckpointError(
            f"transformers cannot read {file}, and code that comes with a model is not run: {error}"
        ) from error
    if config is None:
        raise CheckpointError(f"{file} is the config of a delta; name its backbone's folder.")
    config._attn_implementation = "eager"  # a config may name a kernel to download
    named = str(class_name or next(iter(config.architectures or ()), ""))
    if not named:
        raise ConfigError(
            f"{file} names no class under 'architectures'; say which with --class, "
            "such as --class BertModel."
        )
    found = getattr(transformers, named, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return config, found
    raise ConfigError(
        f"{named!r} is not a model of transformers, and code from elsewhere is not run."
        + nearest(named, dir(transformers))
        + " --class says which class to take."
    )
