"""Hooks that come in, and go, together with other changes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from opendelta.ground import seams
from opendelta.mechanism.changes import Changes


def add_forward_hook(
    changes: Changes,
    module: nn.Module,
    hook: Any,
    *,
    before: bool = False,
    first: bool = False,
    with_kwargs: bool = False,
    always_call: bool = False,
) -> RemovableHandle:
    """As ``register_forward_hook`` or, with `before`, ``register_forward_pre_hook``.

    Args:
        changes: what the hook comes in with.
        module: where to.
        hook: what to call.
        first: before the hooks that are there already.
        with_kwargs: the hook takes the keyword arguments too.
        always_call: also after an error.
    """
    hooks, *flags = seams.forward_hooks(module, before)
    handle = RemovableHandle(hooks, extra_dict=flags)
    table: Any = changes.of(hooks)
    table[handle.id] = hook
    if first:
        table.move_to_end(handle.id, last=False)
    if with_kwargs:
        changes.of(flags[0])[handle.id] = True
    if always_call:
        changes.of(flags[1])[handle.id] = True
    return handle


def add_state_dict_hooks(
    changes: Changes, module: nn.Module, after_saving: Any, before_loading: Any
) -> list[RemovableHandle]:
    """As ``register_state_dict_post_hook`` and ``register_load_state_dict_pre_hook``."""
    saving: Any = module._state_dict_hooks
    loading: Any = module._load_state_dict_pre_hooks
    handles = [RemovableHandle(saving), RemovableHandle(loading)]
    changes.of(saving)[handles[0].id] = seams.as_state_dict_hook(after_saving)
    changes.of(loading)[handles[1].id] = seams.as_load_state_dict_hook(before_loading, module)
    return handles


def take_off(changes: Changes, handle: RemovableHandle | None) -> None:
    """As ``handle.remove()``; a hook that is off already, or none, is let be."""
    if handle is None:
        return
    for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref):
        table = ref()
        if table is not None:
            changes.of(table).pop(handle.id, None)
