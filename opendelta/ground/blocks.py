"""``with`` blocks that are left whatever happens, also where Ctrl-C comes at their very end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


@contextmanager
def undone(undo: Callable[[], Any]) -> Iterator[None]:
    """A ``with`` block after which `undo`, which may be called twice, has run to its end.

    Ctrl-C may break the first call off before anything has changed. At the end of the ``with``
    statement itself it lets go of this generator, whose closing runs what is left.
    """
    is_done = False
    try:
        try:
            yield
        finally:
            undo()
            is_done = True
    finally:
        if not is_done:
            undo()


@contextmanager
def within(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """Inside all of `contexts`, such as `torch.no_grad()`; each is left in any case."""
    stack = ExitStack()
    with undone(stack.close):
        for context in contexts:
            stack.enter_context(context)
        yield
