"""The calls of prefixed attention modules that run now, in this thread.

A prefix acts from the hook before its attention module to the hook after it. Torch skips the
latter for errors that are no `Exception` (an interrupt), so a call also knows the frame that it
belongs to: once that has ended, the call is over, whatever was skipped.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType

import torch
from torch import Tensor, nn


class PrefixedCall:
    """One call of a prefixed attention module.

    Args:
        host: the module.
        key: prefix keys of shape (tokens, width), or (batch, tokens, width) where each row has
            its own; `value`: prefix values, likewise.
        visible: which of them each row sees, (batch, tokens); None for all.

    Attributes:
        joined: whether the prefix has taken part in an attention.
    """

    def __init__(
        self, host: nn.Module, key: Tensor, value: Tensor, visible: Tensor | None = None
    ) -> None:
        self.host, self.key, self.value, self.visible = host, key, value, visible
        self.joined = False
        self.frame = None if torch.compiler.is_compiling() else _frame_of_module_call()

    @property
    def tokens(self) -> int:
        """Length of the prefix."""
        return self.key.shape[-2]

    def put_in_front(self, key: Tensor, value: Tensor) -> None:
        """Let another prefix of the same module come before this one."""
        self.key, self.value = torch.cat([key, self.key]), torch.cat([value, self.value])

    def start(self) -> None:
        """Act from now on."""

    def stop(self) -> None:
        """Act no longer."""

    def abandon(self) -> None:
        """`stop`, for a call whose end went unnoticed."""

    @property
    def is_over(self) -> bool:
        """Whether the frame of the call has ended."""
        if self.frame is None:
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is None


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[PrefixedCall] = []


_RUNNING = _Running()


def running_call() -> PrefixedCall | None:
    """The innermost call of a prefixed attention module that runs now."""
    calls = _RUNNING.calls
    return calls[-1] if calls and not calls[-1].is_over else None


def _not_over() -> list[PrefixedCall]:
    """The calls of this thread, after dropping those whose end went unnoticed."""
    calls = _RUNNING.calls
    while calls and calls[-1].is_over:
        calls.pop().abandon()
    return calls


def begin(call: PrefixedCall) -> None:
    """Start a call."""
    _not_over().append(call)
    call.start()


def end(host: nn.Module) -> PrefixedCall | None:
    """Stop the running call of `host`, if there is one."""
    calls = _not_over()
    if not any(call.host is host for call in calls):
        return None
    while calls[-1].host is not host:
        calls.pop().abandon()
    call = calls.pop()
    call.stop()
    return call


def _frame_of_module_call() -> FrameType | None:
    """The frame inside `nn.Module.__call__` that runs the current hook."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != nn.Module.__module__:
        frame = frame.f_back
    return frame
