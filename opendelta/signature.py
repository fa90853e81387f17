"""What arguments a function takes (specification 1.23.4), and what its code refers to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple


class Signature(NamedTuple):
    """A function's input arguments.

    Attributes:
        args: names of the positional arguments.
        defaults: their default values, from the first that has one; None if none has.
        varargs: name of the ``*args`` argument, or None.
        keywords: name of the ``**kwargs`` argument, or None.
    """

    args: list[str]
    defaults: tuple[Any, ...] | None
    varargs: str | None
    keywords: str | None


def signature(f: Callable[..., Any]) -> Signature:
    """The input arguments of `f`, keyword-only ones left out."""
    parameters = inspect.signature(f).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    defaults = tuple(p.default for p in positional if p.default is not p.empty)
    varargs = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    keywords = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    return Signature([p.name for p in positional], defaults or None, varargs, keywords)


def names_in_code(f: Callable[..., Any]) -> frozenset[str]:
    """The names that a function's code refers to: globals, attributes and its own variables."""
    code = getattr(inspect.unwrap(f), "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names + code.co_varnames)


def get_arg_names(f: Callable[..., Any]) -> list[str]:
    """Names of a function's arguments without ``self``."""
    return [name for name in signature(f).args if name != "self"]


def get_arg_names_inside_func(func: Callable[..., Any]) -> list[str]:
    """Names of a function's arguments, as seen from inside it, without ``self``."""
    names = inspect.signature(func).parameters
    return [name for name in names if name != "self"]
