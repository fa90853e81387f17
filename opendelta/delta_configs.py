"""Configs as files between people (specification 1.20.1)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opendelta.center.center import DeltaCenter
from opendelta.center.names import check_name
from opendelta.center.resolve import SOURCE_ARGUMENTS, resolve, source_arguments
from opendelta.delta.config import ConfigFields
from opendelta.delta.registry import canonical_type
from opendelta.exceptions import CheckpointError, ConfigError, UnknownArgumentError
from opendelta.ground.files import CONFIG_FILE, read_config, write_atomically
from opendelta.version import __version__

if TYPE_CHECKING:
    from typing import Self

# What `save_finetuned(push_to_hub=True)` of a config takes.
_PUSH_ARGUMENTS = "center token repo_id temp_dir message private revision create_pr".split()


class BaseDeltaConfig(ConfigFields):
    """Base class of all configs.

    Args:
        modified_modules: patterns of the modules to modify; None for the method's defaults.
        exclude_modules: patterns of modules left alone, with all inside them.
        unfrozen_modules: patterns of what stays trainable in `freeze_module`.
        common_structure: whether patterns are common names (``attn.q``).
        backbone_class: name of the class of the backbone that the delta was trained on.
        backbone_checkpoint_name: where that backbone came from.
        backbone_hash: of what the delta relies on, see `gen_model_hash`; files say in
            ``backbone_hash_format`` of which format it is.
        own_modules: patterns, or names, of the modules of which the delta has its own.
        kwargs: the fields of the method, and facts that a saved config holds.

    Raises:
        UnknownArgumentError: for a field that the method does not have.
    """

    loading_arguments = ConfigFields.loading_arguments | SOURCE_ARGUMENTS

    @classmethod
    def from_finetuned(cls, finetuned_delta_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """The config of a saved delta.

        Args:
            finetuned_delta_path: a folder that holds ``config.json``, or such a file, or its
                URL, or the name of a delta on a center.
            kwargs: fields to override, and where it comes from (``center``, ``cache_dir``, ...,
                see `opendelta.center.resolve.resolve`).

        Raises:
            CheckpointError: if there is no such file, or it is not a delta's.
        """
        source = resolve(finetuned_delta_path, **source_arguments(kwargs))
        values = read_config(source, to_load=True)
        if cls.delta_type and canonical_type(values["delta_type"]) != cls.delta_type:
            raise ConfigError(
                f"{finetuned_delta_path} holds a {values['delta_type']!r} delta, not a "
                f"{cls.delta_type!r} one; AutoDeltaConfig.from_finetuned reads any."
            )
        config = cls.from_dict(values, **kwargs)
        config.from_file = True
        return config

    def save_finetuned(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``config.json`` into a folder, which is made if it does not exist.

        Args:
            save_directory: the folder.
            kwargs: ``push_to_hub=True`` publishes it too, with what the folder holds of a delta:
                under the name ``repo_id`` (None: that of the folder), on ``center`` with ``token``
                (see `DeltaCenter.from_url`), with ``message``, ``private``, ``revision`` and
                ``create_pr`` (see `DeltaCenter.push`). With ``temp_dir=True`` the folder is not
                touched, and the config is published alone.

        Raises:
            CheckpointError: if `save_directory` is a file.
            CenterError: if it cannot be published.
        """
        folder = Path(save_directory)
        push = kwargs.pop("push_to_hub", False)
        options = {name: kwargs.pop(name, None) for name in _PUSH_ARGUMENTS}
        if kwargs:
            raise UnknownArgumentError(
                f"save_finetuned of a config does not take {', '.join(map(repr, kwargs))}."
            )
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; a config is saved into a folder.")
        if not push:
            self._write(folder)
            return
        center = DeltaCenter.from_url(options.pop("center"), options.pop("token"))
        name = check_name(options.pop("repo_id") or folder.absolute().name)
        with tempfile.TemporaryDirectory() as scratch:
            if options.pop("temp_dir"):
                folder = Path(scratch)
            if not (folder / (self.weights_file or "none")).is_file():
                self.weights_file = self.weights_sha256 = None  # it vouches for no weights here
            self._write(folder)
            center.push(folder, name, **{**options, "create_pr": bool(options["create_pr"])})

    def _write(self, folder: Path) -> None:
        facts = {"opendelta_version": __version__, **_library_versions()}
        for name, value in facts.items():
            setattr(self, name, value)
        write_atomically(folder / CONFIG_FILE, self.to_json_string().encode())


def _library_versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch_version": torch.__version__, "transformers_version": transformers.__version__}
