"""Private names of torch and transformers that are leaned on, each with reason and versions tried.

Where one of them moves, the test of that name in ``tests/test_seams.py`` fails.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _WrappedHook

Hooks = dict[int, Any]

NEWEST_TRANSFORMERS = 5, 24  # with which generation is tested


def forward_hooks(module: nn.Module, before: bool) -> list[Hooks]:
    """The tables of a module's forward hooks: the hooks, which take keywords, which always run.

    Hooks before the forward have no table of those that always run.

    torch's ``register_...`` functions register at once; a hook that comes in together with other
    changes has to be put into these tables. Torch 2.0 to 2.14.
    """
    if before:
        return [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs]
    return [
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]


def as_state_dict_hook(hook: Any) -> Any:
    """A hook as ``register_state_dict_post_hook`` puts it into ``_state_dict_hooks``.

    The mark says that it changes the dict in place, returning nothing. Torch 2.5 to 2.14.
    """
    hook._from_public_api = True
    return hook


def as_load_state_dict_hook(hook: Callable[..., Any], module: nn.Module) -> Any:
    """A hook as ``register_load_state_dict_pre_hook`` puts it into its table. Torch 2.0 to 2.14."""
    return _WrappedHook(hook, module)


def active_ddp() -> Any:
    """The `DistributedDataParallel` whose forward runs now, else None.

    Torch has no public way to ask from inside a forward whether DDP runs it. Torch 2.0 to 2.14.
    """
    return nn.parallel.DistributedDataParallel._active_ddp_module


def is_plainly_differentiated() -> bool:
    """Whether plain reverse-mode autograd runs: no functional transform, no forward mode.

    A Python node of the autograd graph serves reverse mode alone. Torch 2.1 to 2.14.
    """
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def runs_backward() -> bool:
    """Whether a backward runs in this thread, where forwards are recomputed. Torch 2.1 to 2.14."""
    return torch._C._current_graph_task_id() >= 0


def is_running(function: str, module: str | None = None) -> bool:
    """Whether a function of this name is running, further out; of this module, if one is named."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function and module in (None, frame.f_globals.get("__name__")):
            return True
        frame = frame.f_back
    return False


def prefill_is_cut() -> bool:
    """Whether `generate` runs its first forward, without the ids that its cache stands for.

    It leaves out as many as the cache has positions. Transformers 5.20 to 5.24.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_prefill":
        frame = frame.f_back
    if frame is None or frame.f_globals.get("__name__") != "transformers.generation.utils":
        return False
    known = frame.f_locals
    left, config = known.get("next_sequence_length"), known.get("generation_config")
    if left is None or (left == 0 and getattr(config, "prefill_chunk_size", None) is not None):
        return False  # in pieces 0 stands for None
    return bool(left < known["input_ids"].shape[1])


def forward_of(model: nn.Module) -> FrameType | None:
    """The frame of a module's own ``forward`` that runs now, further out; None if none does.

    Hooks alone tell that a module is called, and a forward that is called by itself runs none.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        # What torch.compile goes on with after a break is called ``..._resume_in_forward_at_...``.
        if "forward" in frame.f_code.co_name and frame.f_locals.get("self") is model:
            return frame
        frame = frame.f_back
    return None


def is_for_a_model_folder() -> bool:
    """Whether a state dict is asked for here to be written into a folder that looks like a model's.

    A hook on a state dict is not told what it is for. ``save_pretrained`` asks for it, or already
    the `save_model` of transformers' Trainer; where `_save_checkpoint` calls that, it is for the
    Trainer to resume from. Transformers 5.20 to 5.23.
    """
    if not (is_running("save_pretrained") or is_running("save_model", "transformers.trainer")):
        return False
    return not is_running("_save_checkpoint")


def names_in_model(model: nn.Module, saved: Iterable[str]) -> dict[str, str]:
    """Names in a file that ``save_pretrained`` wrote of `model` -> names in the model.

    Where transformers has renamed modules, its files keep the older names, those of a delta's
    tensors included. ``from_pretrained`` alone takes that back, ``load_state_dict`` does not.
    Transformers 5.20 to 5.23.
    """
    modelling = sys.modules.get("transformers.modeling_utils")
    if modelling is None or not isinstance(model, modelling.PreTrainedModel):
        return {name: name for name in saved}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    known = getattr(model, "_weight_conversions", None)
    if known is None:  # it was made from a config
        known = get_model_conversion_mapping(model, add_legacy=False)
        known = [each for each in known if not isinstance(each, PrefixChange)]
    renamings = copy.deepcopy([each for each in known if isinstance(each, WeightRenaming)])
    found = {}
    for name in saved:
        found[name] = name
        for renaming in renamings:  # which note that they were used
            found[name], _ = renaming.rename_source_key(found[name])
    return found


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model or an attention module by name, None for none.

    Transformers has no name for it that all models share: up to 5.23 it is ``past_key_values``
    where attention is cached, from 5.24 on ``cache``; recurrent models have others.
    Transformers 5.20 to 5.24.
    """
    given = (arguments.get(name) for name in _CACHES)
    return next((c for c in given if c is not None and not isinstance(c, bool)), None)


_CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")


@lru_cache
def untried_transformers() -> str | None:
    """The release of transformers if it is newer than all that ``generate`` was tried with.

    What `generate` hands to a model is no promise of its, and a prompt has to know what is cached.
    """
    from transformers import __version__

    major, minor = (int(part) for part in __version__.split(".")[:2])
    return __version__ if (major, minor) > NEWEST_TRANSFORMERS else None


def frame_of_module_call() -> FrameType | None:
    """The frame inside `nn.Module.__call__` that runs the current hook.

    Torch skips the hooks after a forward for errors that are no `Exception`, so that only the end
    of this frame tells that a call is over. Torch 2.0 to 2.14.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != nn.Module.__module__:
        frame = frame.f_back
    return frame


def checkpointed_regions(until: FrameType | None) -> Iterator[tuple[Any, bool]]:
    """The functions that `torch.utils.checkpoint` runs around here, the innermost first.

    Torch does not tell a function that it is computed again, nor for which forward. Torch 2.13.

    Args:
        until: the frame up to which they are looked for; None for all.

    Yields:
        (the function, whether it is computed again).
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not until:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            name, known = frame.f_code.co_name, frame.f_locals
            if name == "checkpoint":
                yield known["function"], False
            elif name == "recompute_fn":
                yield known["fn"], True
            elif name == "backward":
                yield known["ctx"].run_function, True
        frame = frame.f_back


def reentrant_checkpoint() -> Any:
    """The node of reentrant checkpointing whose forward, or backward, runs around here.

    The forward records no graph there, and the backward has nothing but this node in common with
    it. Torch 2.13.

    Returns:
        The innermost one, None if there is none.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint" and frame.f_code.co_name in (
            "forward",
            "backward",
        ):
            return frame.f_locals["ctx"]
        frame = frame.f_back
    return None


def at_end_of_backward(act: Callable[[], None]) -> None:
    """Call something when the backward that runs in this thread is over; not after an error.

    Torch has no public way, and leans on this for DDP and FSDP2. Torch 2.1 to 2.14.
    """
    torch.autograd.Variable._execution_engine.queue_callback(act)


def has_ended(frame: FrameType) -> bool:
    """Whether a frame of this thread runs no more."""
    running: FrameType | None = sys._getframe()
    while running is not None and running is not frame:
        running = running.f_back
    return running is None


def compiled_graphs() -> int:
    """How many graphs this process has compiled; in them hooks note nothing. Torch 2.4 to 2.14."""
    dynamo = sys.modules.get("torch._dynamo")  # a process that never compiled has no graphs
    count: int = 0 if dynamo is None else dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def forget_compiled_code() -> None:
    """Make compiled models trace again: graphs are not guarded on the arrival of a new hook.

    Torch 2.4 to 2.14.
    """
    if compiled_graphs():
        sys.modules["torch._dynamo"].reset()
