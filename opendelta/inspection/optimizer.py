"""What an optimizer holds, and whether that is what should be trained."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from opendelta.exceptions import DeltaWarning, warn
from opendelta.inspection.statistics import count, counts

logger = logging.getLogger(__name__)


def inspect_optimizer_statistics(
    optimizer: Optimizer, verbose: bool = True, *, model: nn.Module | None = None
) -> dict[str, Any]:
    """Count the parameters of every group of an optimizer, and warn where they look wrong.

    Args:
        optimizer: any object with ``param_groups``.
        verbose: log the result at level INFO.
        model: the model that is trained. With it, trainable parameters that the optimizer lacks
            are found too, and all parameters are called by name.

    Returns:
        A dict with one entry ``param_group_0``, ``param_group_1``, ... for each group: its
        ``total_parameters``, ``trainable_parameters`` (int), ``trainable_ratio`` (float, 0 to 1)
        and its options (``lr``, ``weight_decay``, ...). The first three stand beside the groups
        once more, for the whole optimizer.

    Warns:
        DeltaWarning: if the optimizer holds frozen parameters, or lacks trainable ones of `model`.
    """
    statistics: dict[str, Any] = {}
    for i, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        statistics[f"param_group_{i}"] = counts(group["params"]) | options
    held = [p for group in optimizer.param_groups for p in group["params"]]
    statistics |= counts(held)
    if verbose:
        logger.info("optimizer: %s", statistics)
    _warn(held, model)
    return statistics


def _warn(held: list[Tensor], model: nn.Module | None) -> None:
    named = {} if model is None else dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    ids = {id(p) for p in held}

    frozen = [p for p in held if not p.requires_grad]
    if frozen:
        called = [names.get(id(p), f"a parameter of shape {tuple(p.shape)}") for p in frozen]
        warn(
            f"The optimizer holds frozen parameters, which it will not update: {_some(called)} "
            f"({count(frozen):,} values). Build it after freeze_module(), from the "
            "parameters that require a gradient.",
            DeltaWarning,
        )
    lacking = [name for name, p in named.items() if p.requires_grad and id(p) not in ids]
    if lacking:
        warn(
            f"The optimizer lacks trainable parameters, which will stay as they are: "
            f"{_some(lacking)} ({count(named[n] for n in lacking):,} values). Build it after "
            "the delta is on the backbone.",
            DeltaWarning,
        )


def _some(names: list[str], at_most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")
