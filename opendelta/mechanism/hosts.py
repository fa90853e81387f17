"""Whether modules can carry deltas, are still in their places, and of the size they had.

A delta holds on to modules, not to names. What takes the place of one of them (a new head, a
resized one) knows nothing of it, and the delta then acts on what nobody calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from opendelta.exceptions import InsertionError
from opendelta.ground.names import dotted
from opendelta.ground.walk import child_of
from opendelta.mechanism.changes import Changes
from opendelta.mechanism.insertion import Insertion
from opendelta.mechanism.ownership import own_modules


def require_hookable(module: nn.Module, name: str) -> None:
    """Refuse a module on which no delta could act.

    Raises:
        InsertionError: for one of TorchScript, saying what to do.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise InsertionError(
            f"{name!r} is compiled by TorchScript, which runs no hooks, so a delta on it would not "
            "act. Put the delta on the model of Python, then trace that (torch.jit.trace), or "
            "leave the module out with exclude_modules."
        )


def require_made(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse a backbone, by its named modules, that has parameters without a shape yet.

    Raises:
        InsertionError: naming the first module, and what to do.
    """
    for name, module in modules:
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            raise InsertionError(
                f"{name!r} is a {type(module).__name__}, whose parameters have no shape before it "
                "is called: call the model once, then construct the delta."
            )


def require_hosts(
    backbone: nn.Module,
    insertions: Iterable[Insertion],
    changes: Changes | None = None,
    otherwise: str = "",
) -> None:
    """Refuse insertions whose host is gone, or of a size that they are not made for.

    Args:
        backbone: the model; `insertions`: what is on it.
        changes: lets those grow that can, with these changes.
        otherwise: what may be done besides, for the message.

    Raises:
        InsertionError: naming the module, and what to do.
    """
    wrapped: list[Insertion] = []
    for insertion in insertions:
        if child_of(backbone, *filter(None, insertion.host_name.split("."))) is not insertion.host:
            wrapped.append(insertion)
        misfit = insertion.misfit()
        if misfit is not None and not (changes is not None and insertion.grow(changes)):
            raise of_other_size(dotted(insertion.host_name, insertion.name), misfit, otherwise)
    if not wrapped:
        return
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in own_modules(backbone, remove_duplicate=False, originals=True):
        names[id(module)].append(name)
    for insertion in wrapped:
        place, now = insertion.host_name, names[id(insertion.host)]
        if any(_leads_to(name, place) for name in now):
            continue  # inside what was put around it
        moved = f"is {now[0]!r} now" if now else "is no part of the model any more"
        raise InsertionError(
            f"The {type(insertion.host).__name__} that carries {insertion.name!r} of this delta as "
            f"{place!r} {moved}: what stands at {place!r} was put there after the delta, which "
            "does not act on it. Resize embeddings and put in heads first, then construct the "
            "delta; now, put the old module back, or remove() the delta and construct it anew."
            + otherwise
        )


def of_other_size(where: str, misfit: str, otherwise: str = "") -> InsertionError:
    """The refusal of a delta whose host has changed its size."""
    return InsertionError(
        f"{where} does not fit its module any more: {misfit}. Where an embedding got more rows, "
        "attach() or freeze_module() lets LoRA grow with it: call it before this, and before the "
        "optimizer is made. After any other change remove() the delta and construct it anew."
        + otherwise
    )


def _leads_to(name: str, place: str) -> bool:
    """Whether a name is that of `place`, with names of wrappers (``_orig_mod``) in between."""
    parts = iter(name.split("."))
    return all(part in parts for part in place.split(".") if part)
