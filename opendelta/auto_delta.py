"""The classes that load a delta of any method (specification 1.22)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opendelta.basemodel import DeltaBase
from opendelta.center.resolve import resolve, source_arguments
from opendelta.delta.config import ConfigFields
from opendelta.delta.registry import REGISTRY, every_method, model_class_for, register
from opendelta.exceptions import ConfigError
from opendelta.ground.files import read_config
from opendelta.ground.walk import uncompiled
from opendelta.saving.peft_files import read_config as read_config_of_peft
from opendelta.saving.peft_files import read_weights

__all__ = ["REGISTRY", "AutoDeltaConfig", "AutoDeltaModel", "model_class_for", "register"]


every_method()  # REGISTRY is whole for whoever imports it from here


class _ClassMethodsOnly:
    """Base of the auto classes, which are not instantiated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} is not instantiated: call one of its class methods "
            "(from_finetuned, from_config, from_dict)."
        )


class AutoDeltaConfig(_ClassMethodsOnly):
    """Makes the config of whichever method a dict or file names."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> ConfigFields:
        """A config of the class that ``config_dict["delta_type"]`` names.

        Args:
            config_dict: `delta_type` and fields.
            kwargs: fields that override.

        Raises:
            ConfigError: if `delta_type` is missing or unknown, or a field is unknown.

        Example:
            >>> AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_r": 5}).lora_r
            5
        """
        if not isinstance(config_dict, dict):
            raise ConfigError(f"expected a dict, got a {type(config_dict).__name__}.")
        return model_class_for(config_dict).config_class.from_dict(config_dict, **kwargs)

    @classmethod
    def from_finetuned(
        cls, finetuned_delta_path: str | os.PathLike[str], **kwargs: Any
    ) -> ConfigFields:
        """The config of a saved delta of any method.

        Args:
            finetuned_delta_path: a folder that holds ``config.json``, or a Trainer's checkpoint
                with a delta in it, or that file, or its URL, or the name of a delta on a center.
            kwargs: fields to override, and where it comes from (``center``, ``cache_dir``, ...,
                see `opendelta.center.resolve.resolve`).

        Raises:
            CheckpointError: if there is no config, or it is not a delta's.
        """
        source = resolve(finetuned_delta_path, **source_arguments(kwargs))
        config = cls.from_dict(read_config(source, to_load=True), **kwargs)
        config.from_file = True
        return config


class AutoDeltaModel(_ClassMethodsOnly):
    """Puts whichever delta a config or folder holds on a backbone."""

    @classmethod
    def from_config(
        cls,
        config: ConfigFields | dict[str, Any],
        backbone_model: nn.Module,
        **kwargs: Any,
    ) -> DeltaBase:
        """An untrained delta as the config says; weights are loaded by `from_finetuned` only.

        Args:
            config: a config, or a dict that names `delta_type`.
            backbone_model: modified in place.
            kwargs: see `DeltaBase.from_config`.

        Raises:
            ConfigError: for an unknown method or field.
        """
        return model_class_for(config).from_config(config, backbone_model, **kwargs)

    @classmethod
    def from_finetuned(
        cls,
        finetuned_delta_path: str | os.PathLike[str] | None,
        backbone_model: nn.Module,
        delta_config: ConfigFields | dict[str, Any] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        *model_args: Any,
        **kwargs: Any,
    ) -> DeltaBase:
        """A saved delta of any method, with its weights, on `backbone_model` in eval mode.

        Args and errors are those of `DeltaBase.from_finetuned`.
        """
        return DeltaBase.from_finetuned(
            finetuned_delta_path,
            backbone_model,
            delta_config,
            cache_dir,
            state_dict,
            *model_args,
            **kwargs,
        )

    @classmethod
    def from_peft(cls, path: str | os.PathLike[str], backbone_model: nn.Module) -> DeltaBase:
        """An adapter of PEFT's (LoRA, DoRA, (IA)³, prompts), on `backbone_model` in eval mode.

        Where it is and of which rank is read off the tensors, whatever patterns PEFT was given.
        `modules_to_save` become the delta's `own_modules`. What else PEFT trained of the backbone
        itself (biases, tied embeddings) stands in its place while the delta is attached, and is
        among its `unfrozen_modules`, which `freeze_module` leaves trainable.

        Args:
            path: the folder that PEFT's ``save_pretrained`` wrote.
            backbone_model: modified in place.

        Raises:
            ConfigError: for the config of a method that is not read, or of a variant of one.
            CheckpointError: if a file is missing or damaged, or does not fit the backbone.
            InsertionError: if our method does not go on one of the modules.

        Example:
            >>> AutoDeltaModel.from_peft("peft_adapter", model).save_finetuned("my_delta")
        """
        if not isinstance(backbone_model, nn.Module):
            raise ConfigError(
                f"from_peft: backbone_model is a {type(backbone_model).__name__}; expected first "
                "the folder, then the backbone, a torch nn.Module."
            )
        config = read_config_of_peft(Path(path))
        methods = [m for m in every_method().values() if hasattr(m, "reads_peft")]
        for method in methods:
            if method.reads_peft(config.values):
                tensors = read_weights(Path(path))
                made, own = method.from_peft_form(config, tensors, uncompiled(backbone_model))
                delta: DeltaBase = method.from_finetuned(None, backbone_model, made, state_dict=own)
                return delta
        read = sorted({repr(name) for method in methods for name in method.peft_types})
        raise ConfigError(
            f"{config.file}: peft_type={config.values.get('peft_type')!r}; expected one of "
            f"{', '.join(read)}, those that are read."
        )
