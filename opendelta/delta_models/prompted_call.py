"""Which call of a prompted model runs, and at which site it got longer.

Calls are noted by thread. Compiled code tells neither threads nor frames apart: what is to be known
there lies on the site and on the prompt, on whose attributes graphs are guarded.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.delta_models.prompt_layer import Site, SoftPromptLayer
from opendelta.delta_models.prompt_places import Places
from opendelta.ground.seams import frame_of_module_call, has_ended


@dataclass(eq=False)
class PromptedCall:
    """A call that a site has made longer.

    Attributes:
        site: which site; `host`: its module; `frame`: the call.
        places: where the prompt is; None where it was put in none.
        features: what a wrapper was given, and a copy of the longer one that it got.
        standing_in: which ids at the token embedding stand for the prompt.
    """

    site: Site
    host: nn.Module
    frame: FrameType
    places: Places | None = None
    features: tuple[Any, ...] = ()
    standing_in: Tensor | None = None


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[PromptedCall] = []


_RUNNING = _Running()


def running(layer: SoftPromptLayer) -> PromptedCall | None:
    """The call that runs in this thread with a prompt; None in compiled code."""
    if torch.compiler.is_compiling():
        return None
    calls = [call for call in _RUNNING.calls if call.site.prompt.mark is layer.mark]
    return next((call for call in reversed(calls) if not has_ended(call.frame)), None)


def is_entered(layer: SoftPromptLayer) -> bool:
    """Whether a site has made the call that runs longer already."""
    return layer.is_entered if torch.compiler.is_compiling() else running(layer) is not None


def begin(site: Site, host: nn.Module) -> Site | PromptedCall:
    """Note that a site makes a call longer; returns what holds its `places`."""
    site.prompt.is_entered = True  # for compiled code inside, too
    if torch.compiler.is_compiling():
        site.leads = True
        return site
    frame = frame_of_module_call()
    assert frame is not None  # this is a hook
    call = PromptedCall(site, host, frame)
    _RUNNING.calls.append(call)
    return call


def held(site: Site, host: nn.Module) -> Site | PromptedCall | None:
    """What holds the `places` of a call that this site made longer; None if it did not."""
    if torch.compiler.is_compiling():
        return site if site.leads else None
    call = running(site.prompt)
    return call if call is not None and call.site is site and call.host is host else None


def end_compiled(site: Site) -> None:
    """After a call in compiled code, where `leave` has no calls to look at."""
    if torch.compiler.is_compiling() and site.leads:
        site.places, site.leads, site.prompt.is_entered = None, False, False


def leave(host: nn.Module, args: Any, output: Any) -> None:
    """After a host, also after an error: its call is over."""
    if torch.compiler.is_compiling():
        return
    for call in [c for c in _RUNNING.calls if c.host is host or has_ended(c.frame)]:
        _RUNNING.calls.remove(call)
        call.site.prompt.is_entered = False
