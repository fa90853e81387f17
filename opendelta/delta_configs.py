"""Configs: what was passed to a delta's constructor, as a JSON file between people.

A method declares its hyper-parameters once, in the constructor of its model; the fields of its
config are read off that signature when the model class is made (`BaseDeltaConfig.derive`).
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from opendelta.center.center import DeltaCenter
from opendelta.center.names import check_name
from opendelta.center.resolve import SOURCE_ARGUMENTS, resolve, source_arguments
from opendelta.exceptions import CheckpointError, ConfigError, UnknownArgumentError, nearest
from opendelta.ground.files import CONFIG_FILE, read_config, write_atomically
from opendelta.version import __version__

if TYPE_CHECKING:
    from typing import Self

    from opendelta.basemodel import DeltaBase

# Arguments of loading, which every config loader accepts and which are not configuration.
LOADING_ARGUMENTS = SOURCE_ARGUMENTS | frozenset(
    "backbone_model check_hash proxies resume_download use_auth_token interactive_modify".split()
)
# Keys of 0.3.2's files that say nothing today.
_LEGACY_KEYS = frozenset({"sequential", "scaled", "bottleneck_dim"})
# What `save_finetuned(push_to_hub=True)` of a config takes.
_PUSH_ARGUMENTS = "center token repo_id temp_dir message private revision create_pr".split()
# What a saved config says beyond its fields.
_FACTS: dict[str, type] = {
    "backbone_hash_excludes": list,
    "weights_file": str,
    "weights_sha256": str,
    "list_tags": list,
    "dict_tags": dict,
    "opendelta_version": str,
    "transformers_version": str,
    "torch_version": str,
}


class BaseDeltaConfig:
    """Base class of all configs.

    Args:
        modified_modules: patterns of the modules to modify; None for the method's defaults.
        exclude_modules: patterns of modules left alone, with all inside them.
        unfrozen_modules: patterns of what stays trainable in `freeze_module`.
        common_structure: whether patterns are common names (``attn.q``).
        backbone_class: name of the class of the backbone that the delta was trained on.
        backbone_checkpoint_name: where that backbone came from.
        backbone_hash: md5 of what the delta relies on, see `gen_model_hash`.
        kwargs: the fields of the method, and facts that a saved config holds.

    Raises:
        UnknownArgumentError: for a field that the method does not have.
    """

    delta_type: ClassVar[str] = ""
    method_fields: ClassVar[dict[str, Any]] = {}
    derived: ClassVar[bool] = False

    backbone_hash_excludes: list[str] | None
    weights_file: str | None
    weights_sha256: str | None
    list_tags: list[Any] | None
    dict_tags: dict[str, Any] | None

    def __init__(
        self,
        modified_modules: list[str] | None = None,
        exclude_modules: list[str] | None = None,
        unfrozen_modules: list[str] | None = ["deltas"],  # noqa: B006 - the documented default
        common_structure: bool | None = False,
        backbone_class: str | None = None,
        backbone_checkpoint_name: str | None = None,
        backbone_hash: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.modified_modules = _as_list(modified_modules)
        self.exclude_modules = _as_list(exclude_modules)
        self.unfrozen_modules = _as_list(unfrozen_modules) or ["deltas"]
        self.common_structure = common_structure
        self.backbone_class = backbone_class
        self.backbone_checkpoint_name = backbone_checkpoint_name
        self.backbone_hash = backbone_hash
        for name, default in self.method_fields.items():
            if self.derived or name in kwargs:  # a config written by hand sets its own fields
                setattr(self, name, copy.copy(kwargs.pop(name, default)))
        for name, kind in _FACTS.items():
            value = kwargs.pop(name, None)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name}={value!r:.80}; expected a {kind.__name__}.")
            setattr(self, name, value)
        kwargs.pop("delta_type", None)
        kwargs.pop("registraction_name", None)  # 0.3.2's, always "deltas"
        self._reject_unknown(kwargs)
        self.from_file = False

    def _reject_unknown(self, names: dict[str, Any]) -> None:
        unknown = [name for name in names if name not in LOADING_ARGUMENTS]
        if unknown:
            choices = [*self.field_names(), *_FACTS]
            raise UnknownArgumentError(
                f"{type(self).__name__} has no field {unknown[0]!r}."
                + nearest(unknown[0], choices)
                + f" Its fields are {', '.join(self.field_names())}."
            )

    @classmethod
    def derive(cls, model_class: type[DeltaBase]) -> None:
        """Read the method's fields off the constructor of `model_class`."""
        base = list(inspect.signature(BaseDeltaConfig.__init__).parameters.values())[1:-1]
        skip = {"self", "backbone_model", "interactive_modify", *(p.name for p in base)}
        parameters = [
            p
            for p in inspect.signature(model_class.__init__).parameters.values()
            if p.name not in skip and p.kind is not p.VAR_KEYWORD
        ]
        cls.method_fields = {p.name: p.default for p in parameters}
        cls.delta_type = model_class.delta_type
        if "__init__" in vars(cls):  # a config written by hand, in the style of 0.3.2
            return
        own = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in parameters]
        signature = inspect.Signature([*own, *base])

        def __init__(self: BaseDeltaConfig, *args: Any, **kwargs: Any) -> None:
            named = signature.bind_partial(*args).arguments
            twice = next((name for name in named if name in kwargs), None)
            if twice:
                raise UnknownArgumentError(f"{cls.__name__} was given {twice!r} twice.")
            BaseDeltaConfig.__init__(self, **named, **kwargs)

        cls.derived = True
        cls.__init__ = __init__  # type: ignore[method-assign]
        cls.__signature__ = signature  # type: ignore[attr-defined]

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of all fields: the method's, then those that every config has."""
        base = list(inspect.signature(BaseDeltaConfig.__init__).parameters)[1:-1]
        return [*cls.method_fields, *base]

    # --- dict and JSON ----------------------------------------------------------------------

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """A config from a dict of its fields.

        Args:
            config_dict: fields, such as `to_dict` returns or a ``config.json`` holds.
            kwargs: fields that override those of the dict; arguments of loading are ignored.

        Raises:
            UnknownArgumentError: for a key that is no field.
            ConfigError: if the dict was written by a newer major version of the library.
        """
        if not isinstance(config_dict, dict):
            raise ConfigError(f"expected a dict of fields, got a {type(config_dict).__name__}.")
        _check_version(config_dict)
        values = {**config_dict, **kwargs}
        for key in ("modified_modules", "exclude_modules", "unfrozen_modules"):
            values[key] = _without_marks(values.get(key))
        for key, default in cls.method_fields.items():
            if values.get(key) is None and default is not None:  # 0.3.2 wrote "scaled": null
                values.pop(key, None)
        ignored = set(LOADING_ARGUMENTS)
        if str(config_dict.get("opendelta_version", "")).startswith("0."):
            ignored |= _LEGACY_KEYS - set(cls.method_fields)
        return cls(**{key: value for key, value in values.items() if key not in ignored})

    def to_dict(self) -> dict[str, Any]:
        """All fields, `delta_type` and the facts that are known, as a dict fit for JSON."""
        values = {"delta_type": self.delta_type}
        names = [name for name in self.field_names() if hasattr(self, name)]
        values |= {name: copy.deepcopy(getattr(self, name)) for name in names}
        return values | {n: getattr(self, n) for n in _FACTS if getattr(self, n) is not None}

    def get_config_dict(self) -> dict[str, Any]:
        """The dict from which `from_dict` makes an equal config."""
        return self.to_dict()

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON with sorted keys.

        Raises:
            ConfigError: naming a field that JSON cannot hold.
        """
        for name, value in self.to_dict().items():
            require_json(name, value)
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BaseDeltaConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, default=repr)
        return f"{type(self).__name__} {text}"

    # --- files ------------------------------------------------------------------------------

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
        values = read_config(resolve(finetuned_delta_path, **source_arguments(kwargs)))
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


def require_json(name: str, value: Any) -> None:
    """Refuse a field that JSON cannot hold.

    Raises:
        ConfigError: naming it.
    """
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={value!r:.80} cannot be saved: {error}.") from error


def canonical_type(delta_type: str) -> str:
    """`delta_type` as the library spells it (``lowrankadapter`` is ``low_rank_adapter``)."""
    from opendelta.auto_delta import REGISTRY  # the registry needs this module first

    model = REGISTRY.get(delta_type)
    return model.delta_type if model is not None else delta_type


def _as_list(patterns: Any) -> Any:
    """A sequence as a new list, which is what JSON gives back; anything else as it is."""
    return list(patterns) if isinstance(patterns, (list, tuple)) else patterns


def _without_marks(patterns: Any) -> Any:
    """Patterns of 0.3.2's files mark common names with ``@`` (``attn@.q@``)."""
    if isinstance(patterns, str):
        return patterns if patterns.startswith("[r]") else patterns.replace("@", "")
    if isinstance(patterns, (list, tuple)):
        return [_without_marks(pattern) for pattern in patterns]
    return patterns


def _check_version(values: dict[str, Any]) -> None:
    written_by = values.get("opendelta_version")
    if not written_by:
        return
    try:
        newer = int(str(written_by).split(".")[0]) > int(__version__.split(".")[0])
    except ValueError as error:
        raise ConfigError(f"opendelta_version={written_by!r} is not a version.") from error
    if newer:
        raise ConfigError(
            f"This config was written by opendelta {written_by}, which is newer than the installed "
            f"{__version__}: update the library to read it."
        )


def _library_versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch_version": torch.__version__, "transformers_version": transformers.__version__}
