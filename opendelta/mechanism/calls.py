"""What a backbone was called with, for modules deep inside it.

The root's hooks note each call as it begins and ends, by thread. Under gradient checkpointing a
part of it runs again when the call is long over, in a backward, maybe in another thread: there the
call is found by the function that is checkpointed, of which transformers makes a new one each time,
or as the only call whose graph is still alive. For that the nodes of its output in the autograd
graph hold on to the call, as long as the graph lives.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from opendelta.exceptions import InsertionError
from opendelta.ground.containers import Args, Kwargs
from opendelta.ground.seams import (
    checkpointed_regions,
    frame_of_module_call,
    has_ended,
    runs_backward,
)


class Call:
    """One call of a backbone.

    Attributes:
        root: the backbone.
        args, kwargs: what it was called with.
    """

    def __init__(self, root: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.root, self.args, self.kwargs = root, args, kwargs
        self.frame = frame_of_module_call()

    def arguments(self) -> dict[str, Any]:
        """The arguments by name, without those that were left at their defaults."""
        kind: Any = type(self.root)
        names, spread = _parameters(kind)
        given = dict(zip(names, self.args, strict=False))
        if len(self.args) > len(names):
            given[spread or "args"] = self.args[len(names) :]
        return {**given, **self.kwargs}


@lru_cache(maxsize=256)
def _parameters(root: Hashable) -> tuple[list[str], str | None]:
    """The positional arguments of a class's forward, and the name of its ``*args``."""
    forward: Any = root.forward  # type: ignore[attr-defined]
    parameters = [*inspect.signature(forward).parameters.values()][1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    spread = (p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.kind in kinds], next(spread, None)


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.picks: list[Callable[[Tensor], Tensor]] = []  # which rows of a mixed batch run now


_RUNNING = _Running()
_WITH_GRAPH: WeakSet[Call] = WeakSet()  # calls whose graph is alive
_IN_REGION: WeakKeyDictionary[Any, WeakSet[Call]] = WeakKeyDictionary()  # by checkpointed function


def call_arguments() -> dict[str, Any]:
    """What the backbone was called with in the forward that runs now, by name.

    For delta modules and actions deep inside: the attention mask, the ids, the cache. It is what
    the user passed, in the thread that asks, also while gradient checkpointing computes a block
    again. Within `route`, a delta that runs on its rows alone gets those rows of the tensors.

    Returns:
        Name -> value; arguments left at their defaults are not among them.

    Raises:
        InsertionError: outside of a forward of a backbone with deltas, in compiled code, and in a
            recomputation that may belong to several forwards.

    Example:
        >>> class LastToken(nn.Module):
        ...     def forward(self, hidden):
        ...         mask = opendelta.call_arguments().get("attention_mask")
    """
    if torch.compiler.is_compiling():
        raise InsertionError(
            "call_arguments() cannot be asked in compiled code: compile the model without this "
            "delta, or leave the modules that carry it out of compilation."
        )
    call = _current()
    if call is None:
        raise InsertionError(
            "call_arguments() was asked where no forward of a backbone with an attached delta "
            "runs: call the backbone itself, as in `model(**batch)`."
        )
    if not _RUNNING.picks:
        return call.arguments()
    pick = _RUNNING.picks[-1]
    found = call.arguments().items()
    return {name: pick(value) if isinstance(value, Tensor) else value for name, value in found}


@contextmanager
def picking(pick: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within a ``with`` block tensors among the arguments are what `pick` makes of them."""
    _RUNNING.picks.append(pick)
    try:
        yield
    finally:
        _RUNNING.picks.pop()


def _calls() -> list[Call]:
    """The calls that run in this thread, the innermost last."""
    calls = _RUNNING.calls
    while calls and (calls[-1].frame is None or has_ended(calls[-1].frame)):
        calls.pop()  # torch skips the hooks after a forward that Ctrl-C ended
    return calls


def _current() -> Call | None:
    running = next(reversed(_calls()), None)
    regions = [*checkpointed_regions(None if running is None else running.frame)]
    again = any(is_again for _, is_again in regions)
    if running is None or again:
        if not again and not runs_backward():
            return None
        known = [_IN_REGION[function] for function, _ in regions if function in _IN_REGION]
        waiting = [*(known[0] if known else _WITH_GRAPH)]
        if len(waiting) != 1:
            raise InsertionError(
                f"A part of the model is computed again in this backward, and {len(waiting)} "
                "forwards wait for theirs: to which of them it belongs cannot be told. Call "
                "backward after each forward, or checkpoint by the model's own "
                "gradient_checkpointing_enable()."
            )
        running = waiting[0]
    for function, _ in regions:
        _IN_REGION.setdefault(function, WeakSet()).add(running)
    return running


# --- what the hooks note --------------------------------------------------------------------------


def begin(root: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Before the root: its call begins, in this thread."""
    _calls().append(Call(root, args, kwargs))


def end(root: nn.Module, output: Any) -> list[Any]:
    """After the root, also after an error: its call is over, and missed ones inside.

    Returns:
        The nodes of its output in the autograd graph.
    """
    calls, nodes = _RUNNING.calls, []
    if not any(call.root is root for call in calls):
        return []
    while (call := calls.pop()).root is not root:
        pass
    call.frame = None  # which would keep all its variables alive
    given = {t.grad_fn for t in _tensors([call.args, call.kwargs]) if t.grad_fn is not None}
    for tensor in _tensors(output):  # a node that the arguments hold would keep them alive for ever
        if tensor.grad_fn is not None and tensor.grad_fn not in given:
            notes: Any = tensor.grad_fn.metadata
            notes["opendelta.call"] = call
            _WITH_GRAPH.add(call)
            nodes.append(tensor.grad_fn)
    return nodes


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, tuple, list)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)
