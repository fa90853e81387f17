"""Times that compare: all ways in turns, round by round, so that disturbances meet all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """Median of per-round ratios, with the quartiles."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f}-{self.high:.3f})"


def interleaved(
    ways: Mapping[str, Callable[[Any], Any]],
    rounds: int,
    prepare: Callable[[str], Any] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds that each way takes in each round, after a round that does not count.

    Args:
        ways: what to time; each gets what `prepare` made for it.
        rounds: how often.
        prepare: called before each, outside of the time taken.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    gc.collect()
    gc.freeze()  # what is there already is not looked through again before each
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            ready = prepare(name)
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            ways[name](ready)
            taken = time.perf_counter() - start
            gc.enable()
            if number:
                times[name].append(taken)
    gc.unfreeze()
    return times


def ratio(times: list[float], of: list[float]) -> Ratio:
    """How `times` relate to those `of` another way in the same rounds."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, of, strict=True)], n=4)
    return Ratio(middle, low, high)
