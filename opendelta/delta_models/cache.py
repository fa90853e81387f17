"""What the cache holds that a model, or an attention module, was called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.exceptions import DeltaWarning, warn
from opendelta.ground.seams import (
    NEWEST_TRANSFORMERS,
    cache_of,
    is_running,
    untried_transformers,
)

_told: list[str] = []


def cached_positions(given: Mapping[str, Any]) -> int:
    """How many positions the cache among a model's arguments holds, prompt included.

    A recurrent state does not count them: 1 stands for any number.
    """
    cache = cache_of(given)
    if cache is None:
        return 0
    tell_if_untried()
    if getattr(cache, "is_linear", None) and all(cache.is_linear):
        return int(cache.has_previous_state())
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 1


def cached_tokens(host: nn.Module, given: Mapping[str, Any]) -> int | Tensor:
    """How many tokens the cache among the arguments of the attention module `host` holds."""
    cache = cache_of(given)
    if not hasattr(cache, "get_seq_length"):
        return 0
    count: int | Tensor = cache.get_seq_length(getattr(host, "layer_idx", None) or 0)
    return count.clone() if isinstance(count, Tensor) else count  # a static cache counts in place


def tell_if_untried() -> None:
    """Warn once where `generate` runs that is newer than all that were tried."""
    release = None if torch.compiler.is_compiling() else untried_transformers()
    if release is not None and not _told and is_running("generate"):
        _told.append(release)
        warn(
            f"Soft prompts and prefixes in generate() were tried with transformers up to "
            f"{'.'.join(map(str, NEWEST_TRANSFORMERS))}, and this is {release}. Compare the output "
            "with that of use_cache=False once.",
            DeltaWarning,
        )
