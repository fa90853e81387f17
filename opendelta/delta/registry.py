"""The methods by their `delta_type`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from opendelta.exceptions import ConfigError, nearest

REGISTRY: dict[str, Any] = {}  # `delta_type` or alias -> class

# Modules that register methods when they are imported, each named after its `delta_type`.
_homes: list[str] = []

Model = TypeVar("Model", bound="type[Any]")


def homes(modules: Iterable[str]) -> None:
    """Say which modules hold the library's own methods; they are imported when first asked for."""
    _homes.extend(modules)


@overload
def register(first: Model) -> Model: ...
@overload
def register(first: str, *aliases: str) -> Callable[[Model], Model]: ...
def register(first: Any, *aliases: str) -> Any:
    """Class decorator: make a delta class known under its `delta_type`.

    Args:
        first: the class, for a bare ``@register``, or an alias.
        aliases: further names that configs may use: ``@register("lowrankadapter")``.

    Raises:
        ConfigError: if the class names no `delta_type`, or another class has it.
    """

    def add(model: Model, names: tuple[str, ...]) -> Model:
        if not model.delta_type:
            raise ConfigError(f"{model.__name__} sets no delta_type, the name of its method.")
        for name in (model.delta_type, *names):
            known = find(name)
            if known is not None and (known.__module__, known.__qualname__) != (
                model.__module__,
                model.__qualname__,
            ):
                raise ConfigError(
                    f"delta_type={name!r} is {known.__module__}.{known.__name__}'s already."
                )
            REGISTRY[name] = model
        return model

    if isinstance(first, str):
        return lambda model: add(model, (first, *aliases))
    return add(first, ())


def find(delta_type: str) -> Any:
    """The class of a method, None if nobody registered it."""
    if delta_type not in REGISTRY:
        home = next((h for h in _homes if h.rpartition(".")[2] == delta_type), None)
        if home is not None and home not in sys.modules:
            importlib.import_module(home)
    return REGISTRY.get(delta_type)


def every_method() -> dict[str, Any]:
    """`delta_type` -> class of all methods, without aliases."""
    for home in _homes:
        importlib.import_module(home)
    return {model.delta_type: model for model in REGISTRY.values()}


def canonical_type(delta_type: str) -> str:
    """`delta_type` as the library spells it (``lowrankadapter`` is ``low_rank_adapter``)."""
    model = _found(delta_type)
    return delta_type if model is None else str(model.delta_type)


def _found(name: str) -> Any:
    model = find(name)
    if model is None:
        every_method()  # an alias
    return REGISTRY.get(name) if model is None else model


def model_class_for(config: Any) -> Any:
    """The delta class that a config or dict is for.

    Raises:
        ConfigError: if it names no method, or one that nobody registered.
    """
    if not isinstance(config, dict) and not hasattr(type(config), "delta_type"):
        raise ConfigError(
            f"expected a config or a dict of its fields, got {config!r:.80} of type "
            f"{type(config).__name__}; a saved delta is loaded by from_finetuned."
        )
    named = config.get("delta_type") if isinstance(config, dict) else config.delta_type
    if named is not None and not isinstance(named, str):
        raise ConfigError(f"delta_type={named!r} is a {type(named).__name__}; expected a name.")
    model = _found(named) if named else None
    if model is not None:
        return model
    choices = ", ".join(sorted(every_method()))
    if not named:
        raise ConfigError(f"The config names no method: set 'delta_type' to one of {choices}.")
    raise ConfigError(
        f"delta_type={named!r} is not a known method."
        + nearest(str(named), REGISTRY)
        + f" Known are {choices}; a class of your own joins with @opendelta.register."
    )
