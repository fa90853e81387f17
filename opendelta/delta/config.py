"""The fields of a config: what was passed to a delta's constructor.

A method declares its hyper-parameters once, in the constructor of its model; the fields of its
config are read off that signature when the model class is made (`ConfigFields.derive`). The config
of a delta is also where their values live: attribute, file and config read them here.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from opendelta.exceptions import ConfigError, UnknownArgumentError, nearest
from opendelta.version import __version__

if TYPE_CHECKING:
    from typing import Self

# Arguments of loading, which every config loader accepts and which are not configuration.
_LOADING_ARGUMENTS = frozenset(
    "backbone_model check_hash proxies resume_download use_auth_token interactive_modify".split()
)
# Keys of 0.3.2's files that say nothing today.
_LEGACY_KEYS = frozenset({"sequential", "scaled", "bottleneck_dim"})
# Arguments that are not configuration: what is modified, and how the modules are chosen.
NOT_CONFIGURATION = frozenset({"self", "backbone_model", "interactive_modify"})
# A method's arguments that only help to construct it, of which nothing is kept.
HELPERS = frozenset({"tokenizer"})
# How the modules were chosen.
CHOSEN = (
    "modified_modules",
    "exclude_modules",
    "unfrozen_modules",
    "common_structure",
    "own_modules",
)
# What a saved config says beyond its fields.
_FACTS: dict[str, type] = {
    "backbone_hash_format": int,
    "backbone_hash_excludes": list,
    "weights_file": str,
    "weights_sha256": str,
    "list_tags": list,
    "dict_tags": dict,
    "opendelta_version": str,
    "transformers_version": str,
    "torch_version": str,
}


class ConfigFields:
    """The fields of a config; `BaseDeltaConfig` says what they are, and adds files."""

    delta_type: ClassVar[str] = ""
    method_fields: ClassVar[dict[str, Any]] = {}
    derived: ClassVar[bool] = False
    loading_arguments: ClassVar[frozenset[str]] = _LOADING_ARGUMENTS
    is_of_delta: bool = False  # whether a delta stands on these values

    backbone_hash_format: int | None
    backbone_hash_excludes: list[str] | None
    weights_file: str | None
    weights_sha256: str | None
    list_tags: list[Any] | None
    dict_tags: dict[str, Any] | None
    opendelta_version: str | None

    def __init__(
        self,
        modified_modules: list[str] | None = None,
        exclude_modules: list[str] | None = None,
        unfrozen_modules: list[str] | None = ["deltas"],  # noqa: B006 - the documented default
        common_structure: bool | None = False,
        backbone_class: str | None = None,
        backbone_checkpoint_name: str | None = None,
        backbone_hash: str | None = None,
        *,
        own_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.modified_modules = _as_list(modified_modules)
        self.exclude_modules = _as_list(exclude_modules)
        self.unfrozen_modules = _as_list(unfrozen_modules) or ["deltas"]
        self.common_structure = common_structure
        self.backbone_class = backbone_class
        self.backbone_checkpoint_name = backbone_checkpoint_name
        self.backbone_hash = backbone_hash
        self.own_modules = list(own_modules) if own_modules else None
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
        unknown = [name for name in names if name not in self.loading_arguments]
        if unknown:
            choices = [*self.field_names(), *_FACTS]
            raise UnknownArgumentError(
                f"{type(self).__name__} has no field {unknown[0]!r}."
                + nearest(unknown[0], choices)
                + f" Its fields are {', '.join(self.field_names())}."
            )

    def __getattr__(self, name: str) -> Any:  # for type checkers: fields are derived
        raise AttributeError(f"{type(self).__name__} has no field {name!r}.")

    def __setattr__(self, name: str, value: Any) -> None:
        if self.is_of_delta and (name in self.method_fields or name in CHOSEN):
            raise fixed_since_construction(name, value, "this config's delta")
        super().__setattr__(name, value)

    def put(self, **values: Any) -> None:
        """Set fields that a delta stands on, for the delta itself."""
        self.__dict__.update(values)

    @classmethod
    def derive(cls, constructor: Callable[..., None], delta_type: str, owner: str) -> None:
        """Read the method's fields off the constructor of its delta class.

        Raises:
            ConfigError: if a config written by hand has a field that is no argument of it.
        """
        base = base_parameters()
        skip = {*NOT_CONFIGURATION, *HELPERS, *(p.name for p in base)}
        parameters = [
            p
            for p in inspect.signature(constructor).parameters.values()
            if p.name not in skip and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        cls.method_fields = {p.name: p.default for p in parameters}
        cls.delta_type = delta_type
        if "__init__" in vars(cls) and not cls.derived:  # written by hand, in the style of 0.3.2
            signature = inspect.signature(cls.__init__)
            taken = {p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
            strange = sorted(taken - {"self", *cls.method_fields, *(p.name for p in base)})
            if strange and "kwargs" not in inspect.signature(constructor).parameters:
                raise ConfigError(
                    f"{cls.__name__} has a field {strange[0]!r} that is no argument of {owner}."
                    + nearest(strange[0], cls.method_fields)
                )
            return
        own = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in parameters]
        signature = inspect.Signature([*own, *base])

        def __init__(self: ConfigFields, *args: Any, **kwargs: Any) -> None:
            named = signature.bind_partial(*args).arguments
            twice = next((name for name in named if name in kwargs), None)
            if twice:
                raise UnknownArgumentError(f"{cls.__name__} was given {twice!r} twice.")
            ConfigFields.__init__(self, **named, **kwargs)

        cls.derived = True
        cls.__init__ = __init__  # type: ignore[method-assign]
        cls.__signature__ = signature  # type: ignore[attr-defined]

    @classmethod
    def made_for(cls, owner: type) -> Any:
        """A config class for a delta class that names none of its own."""
        return type(f"{owner.__name__}Config", (cls,), {"__doc__": cls.__doc__, "owner": owner})

    def __reduce_ex__(self, protocol: Any) -> Any:
        owner = vars(type(self)).get("owner")  # a class that no module holds is found by its delta
        if owner is None:
            return super().__reduce_ex__(protocol)
        return _new_config_for, (owner,), self.__dict__

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of all fields: the method's, then those that every config has."""
        return [*cls.method_fields, *(p.name for p in base_parameters())]

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
        ignored = set(cls.loading_arguments)
        if is_of_0_3(config_dict.get("opendelta_version")):
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
        return isinstance(other, ConfigFields) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, default=repr)
        return f"{type(self).__name__} {text}"


def _new_config_for(owner: Any) -> Any:
    return object.__new__(owner.config_class)


def base_parameters() -> list[inspect.Parameter]:
    """The fields that every config has, as they are declared."""
    return list(inspect.signature(ConfigFields.__init__).parameters.values())[1:-1]


def fixed_since_construction(name: str, value: Any, owner: str) -> ConfigError:
    """The refusal to set what a delta was built by."""
    return ConfigError(
        f"{name}={value!r:.80} cannot be set any more: {owner} was built by it. Construct a new "
        f"delta with {name}=..., and remove() this one."
    )


def require_json(name: str, value: Any) -> None:
    """Refuse a field that JSON cannot hold.

    Raises:
        ConfigError: naming it.
    """
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={value!r:.80} cannot be saved: {error}.") from error


def is_of_0_3(version: str | None) -> bool:
    """Whether the `opendelta_version` in a config is that of OpenDelta 0.3.2 or before."""
    return str(version).startswith("0.")


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
