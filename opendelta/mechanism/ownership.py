"""Which modules and tensors are the backbone's own, and which a delta's."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

from opendelta.ground.walk import unblocked
from opendelta.mechanism.dispatch import AfterDispatcher, BeforeDispatcher

STANDS_FOR = "_stands_for"  # attribute of a delta module that replaced one of the backbone's


def inserted_names(module: nn.Module) -> tuple[str, ...]:
    """Names under which deltas sit on `module`, attached or not, in order of execution."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return ()
    before, after = BeforeDispatcher.on(module), AfterDispatcher.on(module)
    entries = [*(before.entries if before else ()), *(after.entries if after else ())]
    return tuple(dict.fromkeys([name for name, _ in entries]))


def inserted_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of this module's direct parameters that belong to a delta (BitFit's ``bias``)."""
    return tuple(name for name, p in module._parameters.items() if getattr(p, "_is_delta", False))


def own_modules(
    root: nn.Module, remove_duplicate: bool = True, originals: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` of the backbone alone: nothing that sits inside a delta.

    Args:
        root: the backbone or a part of it.
        remove_duplicate: whether a module with several names comes once, under the first.
        originals: whether a replaced module comes in the place of what replaced it, rather than
            being left out.
    """
    seen: set[int] = set()
    stack = [("", unblocked(root))]
    while stack:
        name, module = stack.pop()
        if remove_duplicate:
            if id(module) in seen:
                continue
            seen.add(id(module))
        yield name, module
        if module._modules:
            prefix = f"{name}." if name else ""
            children = reversed(own_children(module, originals))
            stack += [(prefix + child_name, child) for child_name, child in children]


def twin_of(module: nn.Module, **tables: Any) -> nn.Module:
    """What computes as `module` does, with other tables (``_buffers``, ...), past its hooks.

    It shares all else with the module.
    """
    twin = copy.copy(module)
    hooks: dict[str, Any] = {"_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    twin.__dict__.update(hooks, **tables)
    return twin


def own_children(module: nn.Module, originals: bool = False) -> list[tuple[str, nn.Module]]:
    """(name, child) of a module's children that are the backbone's own, see `own_modules`."""
    deltas = inserted_names(module)
    children = []
    for name, child in module._modules.items():
        if child is None or name in deltas:
            continue
        own = child.__dict__
        if STANDS_FOR in own:
            if not originals:
                continue
            (child,) = own[STANDS_FOR]
            own = child.__dict__
        children.append((name, unblocked(child) if "_module" in own else child))
    return children
