"""Real processes, for the tests of the centers."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from typing import Any

import pytest

from opendelta.exceptions import CenterError

FORK = multiprocessing.get_context("fork")  # no need to import torch again


def in_processes(jobs: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    """Run all at once; an error in one of them fails the test."""
    children = [FORK.Process(target=job, args=arguments) for job, arguments in jobs]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * len(children)


def on_a_full_disk(call: Callable[[], Any]) -> None:
    """Call, in a process of its own, where no file can grow beyond 100,000 bytes: it is refused."""

    def refused() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(CenterError) as caught:
            call()
        assert caught.value.__cause__ is not None

    in_processes([(refused, ())])
