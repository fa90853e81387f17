"""What the code of a module's class does with its children, read off the byte code.

Byte code is no promise of Python's: where it changes, ``tests/test_seams.py`` fails. Tried on
Python 3.10 to 3.13.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

# Facts about a tensor, for which nothing is computed with its values.
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_meta", "requires_grad"}


def children_read(module: nn.Module) -> frozenset[str]:
    """Children whose ``weight`` the forward of `module` reads, while its code never uses them else.

    Neither torch nor the model tells whether a child is called, and only then hooks on it run. The
    code does: a forward, or a method that it uses, says ``self.child.weight``, and no method of the
    class calls ``self.child`` or hands it on. What is reached in other ways (``getattr``, a list of
    modules) is not seen and not among these.
    """
    code = getattr(inspect.unwrap(module.forward), "__code__", None)  # none in TorchScript
    kind: Any = type(module)
    return frozenset() if code is None else _children_read(kind, code)


@lru_cache(maxsize=1024)
def _children_read(kind: type[Any], forward: CodeType) -> frozenset[str]:
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = {
        name: code
        for cls in reversed(classes)
        for name, found in vars(cls).items()
        if (code := _code_of(found)) is not None
    }
    used = [forward]  # the forward, and the methods that it uses
    for code in used:
        used += [functions[n] for n in _names(code) if n in functions and functions[n] not in used]
    read = {child for code in used for child, what in _uses(code) if what == "weight"}
    if not read:
        return frozenset()
    every = [code for cls in classes for f in vars(cls).values() if (code := _code_of(f))]
    return frozenset(
        read - {child for code in [forward, *every] for child, what in _uses(code) if not what}
    )


def _code_of(found: Any) -> CodeType | None:
    """The code of what a class holds: a function, a property, a class's own or static method."""
    function = getattr(found, "fget", None) or getattr(found, "__func__", found)
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(code: CodeType) -> set[str]:
    return {name for part in _codes(code) for name in part.co_names}


def _uses(method: CodeType) -> Iterator[tuple[str, str]]:
    """What a method does with attributes of its first argument.

    Yields:
        (attribute, what of it is taken): ``"weight"`` where values are, ``""`` for the thing
        itself, as where it is called.
    """
    owner = next(iter(method.co_varnames[: method.co_argcount]), None)
    for code in _codes(method) if owner else ():
        steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "EXTENDED_ARG")]
        steps += [steps[-1]] * 3
        for of, attribute, taken, then in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
            if not of.opname.rpartition("LOAD_")[2].startswith(("FAST", "DEREF")):
                continue
            # Some instructions load two variables, the second of which is the one at hand.
            variable = of.argval[-1] if isinstance(of.argval, tuple) else of.argval
            if variable != owner or not _is_attribute(attribute):
                continue
            what = str(taken.argval) if _is_attribute(taken) else ""
            if what in ("forward", "__call__"):
                what = ""
            elif what == "weight" and _is_attribute(then) and then.argval in _FACTS:
                what = "a fact"
            yield attribute.argval, what


def _is_attribute(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")
