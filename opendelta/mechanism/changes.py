"""Changes that are prepared aside and come in together.

Whatever a verb changes of a backbone (children, parameters, hooks, flags, the library's notes) lies
in dicts and attributes. `Changes` keeps a working copy of each that is to change. Preparing may
fail or be interrupted at any point: nothing has changed then. `carry_out` makes all of them what
their copies say, in one call of C code, which Python does not interrupt (a signal waits for the
next instruction) and in which nothing is allocated on a device. So a backbone is wholly before or
wholly after, without a guard at every line.
"""

from __future__ import annotations

import operator
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from opendelta.ground.blocks import undone

Table = TypeVar("Table", bound="dict[Any, Any]")

_call: Callable[[Any], Any] = partial.__call__
_put_data: Callable[[Tensor, Tensor], None] = Tensor.data.__set__  # type: ignore[attr-defined]


class Changes:
    """What is about to change; nothing of it has yet.

    Attributes:
        latest: stands for those that were carried out last, in the whole process.
    """

    latest: ClassVar[object] = object()

    def __init__(self) -> None:
        self._tables: dict[int, tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]] = {}
        self._attributes: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._first: list[partial[Any]] = []
        self._data: dict[int, tuple[Tensor, Tensor]] = {}
        self._others: list[partial[Any]] = []

    def of(self, table: Table) -> Table:
        """The working copy of a dict, to be read and changed in its place."""
        known = self._tables.get(id(table))
        if known is None:
            known = self._tables[id(table)] = table, table.copy(), table.copy()
        return known[2]  # type: ignore[return-value]

    def get(self, owner: Any, name: str) -> Any:
        """An attribute as it is going to be."""
        known = self._attributes.get(id(owner))
        return known[1][name] if known and name in known[1] else getattr(owner, name)

    def set(self, owner: Any, **values: Any) -> None:
        """Change attributes of an object, past its class's own ``__setattr__``."""
        self._attributes.setdefault(id(owner), (owner, {}))[1].update(values)

    def set_data(self, tensor: Tensor, values: Tensor) -> None:
        """Let a tensor have other values, in a storage of theirs."""
        self._data[id(tensor)] = tensor, values

    def data(self, tensor: Tensor) -> Tensor:
        """The values of a tensor as they are going to be."""
        return self._data.get(id(tensor), (tensor, tensor.detach()))[1]

    def do(self, act: Callable[..., Any], *args: Any) -> None:
        """Call something that cannot fail, together with the rest."""
        self._others.append(partial(act, *args))

    def do_first(self, act: Callable[..., Any], *args: Any) -> None:
        """Call something that may fail, before anything else, the same once."""
        if args or all(known.args or known.func is not act for known in self._first):
            self._first.append(partial(act, *args))

    def carry_out(self) -> None:
        """Let everything be as prepared."""
        steps = list(self._first)
        for table, old, new in self._tables.values():
            steps += _differences(table, old, new)
        for owner, values in self._attributes.values():
            steps.append(partial(owner.__dict__.update, values))
        steps += (partial(_put_data, *pair) for pair in self._data.values())
        steps += self._others
        steps.append(partial(setattr, Changes, "latest", object()))
        deque(map(_call, steps), maxlen=0)


def _differences(
    table: dict[Any, Any], old: dict[Any, Any], new: dict[Any, Any]
) -> list[partial[Any]]:
    """What makes `table`, which was `old`, what `new` is, and lets be what others do to it."""
    if len(new) >= len(old) and all(map(operator.is_, old, new)):  # the same, or more at the end
        put = {key: value for key, value in new.items() if old.get(key, new) is not value}
        return [partial(table.update, put)] if put else []
    gone = [key for key in old if key not in new]
    put = {key: value for key, value in new.items() if key not in old or old[key] is not value}
    stay = [key for key in old if key in new]
    added = [key for key in new if key not in old]
    order, steps = [*new], [partial(table.pop, key, None) for key in gone]
    front = added if order == added + stay and hasattr(table, "move_to_end") else []
    if order != stay + added and not front:  # children in another order
        return [partial(table.clear), partial(table.update, new)]
    if put:
        steps.append(partial(table.update, put))
    if stay:
        move: Any = getattr(table, "move_to_end", None)
        steps += [partial(move, key, last=False) for key in reversed(front)]
    return steps


_LOCK = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """One thread at a time prepares changes and carries them out; let go whatever happens."""
    mine: list[bool] = []
    release: Callable[[], Any] = _LOCK.release

    def let_go() -> None:
        if mine:
            _ = mine.pop(), release()

    with undone(let_go):
        mine.append(_LOCK.acquire())
        yield
