"""Checking what a delta's constructor is given against its own signature."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from torch import nn

from opendelta.delta.config import CHOSEN, HELPERS, NOT_CONFIGURATION
from opendelta.delta.record import KEY, Record
from opendelta.exceptions import ConfigError, UnknownArgumentError, nearest

# Names that other libraries give to arguments, and what those are called here.
ELSEWHERE = {
    "r": ("lora_r",),
    "rank": ("lora_r",),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "target_modules": ("modified_modules",),
    "modules_to_save": ("own_modules",),
    "num_virtual_tokens": ("prefix_token_num", "soft_token_num"),
    "feedforward_modules": ("on_input",),
}

# Arguments that every method may take, and all of both.
BASE = (*CHOSEN, "backend")
BASE_ARGUMENTS = NOT_CONFIGURATION.union(BASE)


def checked(constructor: Callable[..., None]) -> Callable[..., None]:
    """Wrap the ``__init__`` of a delta class: check its arguments, and note them in its record.

    Raises (from the wrapped constructor):
        UnknownArgumentError: for a name that the signature does not have, with the nearest.
        ConfigError: for a value of another type than annotated.
    """
    signature = inspect.signature(constructor)
    keywords = {p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
    open_ended = len(keywords) < len(signature.parameters)

    @functools.wraps(constructor)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if name not in keywords]
        if unknown and not open_ended:
            choices = [name for name in signature.parameters if name != "self"]
            here = [name for name in ELSEWHERE.get(unknown[0], ()) if name in choices]
            raise UnknownArgumentError(
                f"{type(self).__name__} has no argument {unknown[0]!r}."
                + (f" Here it is called {here[0]!r}." if here else nearest(unknown[0], choices))
                + f" Its arguments are {', '.join(choices)}."
            )
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise UnknownArgumentError(f"{type(self).__name__}: {error}.") from error
        bound.apply_defaults()
        hints = _hints(constructor)
        for name, value in bound.arguments.items():
            if name in hints and name != "self":
                _check_type(type(self).__name__, name, value, hints[name])
        known: Record | None = self.__dict__.get(KEY)
        if known is not None:  # called by that of a subclass, whose arguments are the config's
            for name, value in bound.arguments.items():
                if name in known.arguments or name in BASE_ARGUMENTS:
                    known.arguments[name] = value
                else:
                    self.__dict__[name] = value
            constructor(self, *args, **kwargs)
            return
        record = self.__dict__[KEY] = Record(dict(bound.arguments))
        constructor(self, *args, **kwargs)
        record.is_made = True
        if "config" in vars(record):  # else the base's constructor was never called
            record.config.put(is_of_delta=True)

    return wrapper


def of_configuration(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A constructor's arguments that are configuration, and those that only help, taken out."""
    helpers = {name: arguments.pop(name) for name in HELPERS if name in arguments}
    return {n: v for n, v in arguments.items() if n not in NOT_CONFIGURATION}, helpers


def require_free_names(cls: Any, base: type) -> None:
    """Refuse hyper-parameters that are called like what every delta has.

    Args:
        cls: the delta class.
        base: that of all deltas. Names are taken by the outermost class in between that belongs to
            the library's base, not to a method.

    Raises:
        ConfigError: naming the first such one.
    """
    owner = cls.__name__
    between = (b for b in cls.__mro__[1:] if issubclass(b, base) and not b.delta_type)
    taken = {*dir(next(between, base)), *vars(nn.Module()), KEY} - BASE_ARGUMENTS
    for name in inspect.signature(cls.__init__).parameters:
        if name in taken and name != "self":
            raise ConfigError(
                f"{owner} has a hyper-parameter called {name!r}, which every delta and every torch "
                f"module has already: give it another name, such as {name + '_factor'!r}."
            )


@functools.cache
def _hints(constructor: Callable[..., None]) -> dict[str, Any]:
    return typing.get_type_hints(constructor)


def _check_type(owner: str, name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        if expected == "Module":
            expected = "a torch nn.Module, such as from_pretrained returns"
        raise ConfigError(
            f"{owner}: {name}={value!r:.80} is of type {type(value).__name__}; expected {expected}."
        )


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type; an int is a float, a bool is no number."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin in (list, tuple, dict):
        if not isinstance(value, origin):
            return False
        options = [option for option in typing.get_args(hint) if option is not Ellipsis]
        if origin is dict:
            pairs = value.items()
            return all(_fits(k, options[0]) and _fits(v, options[1]) for k, v in pairs)
        return all(_fits(item, options[0]) for item in value)
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
