"""What a backbone was called with, for modules deep inside it.

The root's hooks note each call as it begins and ends, by thread. A recomputed forward (gradient
checkpointing) runs when the call is long over, in a backward, maybe in another thread: there it is
found by the input of the checkpointed block, or as the only call whose graph is still alive. For
that the output's node in the autograd graph holds on to the call, as long as the graph lives.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from opendelta.exceptions import InsertionError
from opendelta.ground.containers import Args, Kwargs
from opendelta.ground.seams import frame_of_module_call, has_ended, runs_backward


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
        self.resumed: list[Call | None] = []  # of blocks that are computed again
        self.picked: list[Callable[[Tensor], Tensor]] = []  # which rows of a mixed batch run now


_RUNNING = _Running()
_WITH_GRAPH: WeakSet[Call] = WeakSet()  # calls whose graph is alive
_BY_INPUT: dict[StorageWeakRef, ref[Call]] = {}  # of checkpointed blocks


def call_arguments() -> dict[str, Any]:
    """What the backbone was called with in the forward that runs now, by name.

    For delta modules and actions deep inside: the attention mask, the ids, the cache. It is what
    the user passed, in the thread that asks, also while gradient checkpointing computes a block
    again.

    Returns:
        Name -> value; arguments left at their defaults are not among them.

    Raises:
        InsertionError: outside of a forward of a backbone with deltas, in compiled code, and in a
            recomputation that may belong to several forwards.
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
    return call.arguments()


def _current() -> Call | None:
    if _RUNNING.resumed and _RUNNING.resumed[-1] is not None:
        return _RUNNING.resumed[-1]
    if _RUNNING.calls:
        return _RUNNING.calls[-1]
    if not runs_backward():
        return None
    alive = [*_WITH_GRAPH]
    if len(alive) > 1:
        raise InsertionError(
            f"A part of the model is computed again in this backward, and {len(alive)} forwards "
            "wait for theirs: to which of them it belongs cannot be told. Call backward after "
            "each forward, or checkpoint by the model's own gradient_checkpointing_enable()."
        )
    return alive[0] if alive else None


# --- what the hooks note --------------------------------------------------------------------------


def begin(root: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Before the root: its call begins, in this thread."""
    calls = _RUNNING.calls
    while calls and (calls[-1].frame is None or has_ended(calls[-1].frame)):
        calls.pop()  # torch skips the hooks after a forward that Ctrl-C ended
    calls.append(Call(root, args, kwargs))


def end(root: nn.Module, output: Any) -> None:
    """After the root, also after an error: its call is over, and missed ones inside."""
    calls = _RUNNING.calls
    if not any(call.root is root for call in calls):
        return
    while (call := calls.pop()).root is not root:
        pass
    call.frame = None  # which would keep all its variables alive
    for tensor in _tensors(output):
        if tensor.grad_fn is not None:
            notes: Any = tensor.grad_fn.metadata
            notes["opendelta.call"] = call
            _WITH_GRAPH.add(call)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (value for value in output.values() if isinstance(value, Tensor))
    elif isinstance(output, (tuple, list)):
        yield from (value for value in output if isinstance(value, Tensor))


def enter_block(args: Args) -> None:
    """Before a block under gradient checkpointing: note whose call it is in, or find that again."""
    tensor = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
    storage = None if tensor is None else StorageWeakRef(tensor.untyped_storage())
    if not _RUNNING.calls:
        found = _BY_INPUT.get(storage) if storage is not None else None
        _RUNNING.resumed.append(None if found is None else found())
    elif storage is not None:
        for old in [known for known in _BY_INPUT if known.expired()]:
            del _BY_INPUT[old]
        _BY_INPUT[storage] = ref(_RUNNING.calls[-1])


def leave_block() -> None:
    """After such a block, also after an error."""
    if not _RUNNING.calls and _RUNNING.resumed:
        _RUNNING.resumed.pop()
