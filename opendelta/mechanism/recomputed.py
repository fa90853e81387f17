"""A backward that computes a part of the model again has to find the deltas as its forward did.

Gradient checkpointing keeps no values of a block and runs it again in the backward. Were a delta
attached, detached or merged meanwhile, the gradients would be those of another model. Each forward
that records a graph notes what acts. Where its backward begins, that is compared; only if it
differs, the modules that run in this backward are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from opendelta.exceptions import InsertionError
from opendelta.ground.names import dotted
from opendelta.ground.seams import at_end_of_backward, reentrant_checkpoint, runs_backward
from opendelta.ground.walk import every_module
from opendelta.mechanism.insertion import Insertion


class Standing(NamedTuple):
    """What acts on a backbone.

    Attributes:
        acting: the insertions that do, and whether merged.
        route: the delta of each row; None outside of a route.
    """

    acting: dict[Insertion, str]
    route: Sequence[Any] | None

    def differing(self, now: Standing) -> list[Insertion]:
        """The insertions that act otherwise: in a route, attached, detached or merged."""
        if self == now:
            return []
        if self.route != now.route:
            return [*{**self.acting, **now.acting, **_of_route(self), **_of_route(now)}]
        either = {**self.acting, **now.acting}
        changed = [i for i in either if self.acting.get(i) != now.acting.get(i)]
        if self.route is None:
            return changed
        return [i for i in changed if MERGED in (self.acting.get(i), now.acting.get(i))]


ATTACHED, MERGED = "attached", "merged"


def _of_route(standing: Standing) -> dict[Insertion, str]:
    named = [delta for delta in standing.route or () if delta is not None]
    return {insertion: "routed" for delta in named for insertion in delta.insertions}


def guard(nodes: Sequence[Any], standing: Callable[[], Standing]) -> None:
    """Have the backward through a forward's output compared with what acts now.

    Args:
        nodes: those of the output in the autograd graph.
        standing: asks what acts.
    """
    noted = standing()
    for node in nodes:
        node.register_prehook(partial(_compare, noted, standing))


def _compare(noted: Standing, standing: Callable[[], Standing], grads: Any) -> None:
    """Where a backward reaches the output of a forward: watch it if other deltas act by now."""
    if torch.compiler.is_compiling() or not (differing := noted.differing(now := standing())):
        return

    def watch(module: nn.Module, args: Any) -> None:
        if not runs_backward():
            handle.remove()  # an error ended that backward
            return
        inside = {id(part) for part in every_module(module)}
        for insertion in differing:
            if any(id(place) in inside for place in insertion.places):
                handle.remove()
                raise _otherwise(insertion, noted, now)

    handle = register_module_forward_pre_hook(watch)
    at_end_of_backward(handle.remove)


def note_or_compare(state: Any, standing: Callable[[], Standing]) -> None:
    """Before a forward that a reentrant checkpoint runs whole: it records a graph only again."""
    node = reentrant_checkpoint()
    if node is None:
        return
    notes = node.__dict__.setdefault("_opendelta", {})
    noted = notes.setdefault(state, now := standing())
    for insertion in noted.differing(now):
        raise _otherwise(insertion, noted, now)


def _otherwise(insertion: Insertion, noted: Standing, now: Standing) -> InsertionError:
    what = repr(dotted(insertion.host_name, insertion.name))
    if noted.route != now.route:
        told = f"the forward ran in another route() than this backward, which matters to {what}"
    else:
        then, by_now = (s.acting.get(insertion, "detached") for s in (noted, now))
        told = f"{what} was {then} in the forward and is {by_now} in this backward"
    return InsertionError(
        f"Gradient checkpointing computes a part of the model again, and {told}: the gradients "
        "would be those of another model. Call backward while the deltas are as in the forward: "
        "inside `with delta.attached():` (or route), before attach(), detach(), merge() or "
        "remove()."
    )
