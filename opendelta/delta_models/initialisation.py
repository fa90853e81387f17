"""Initialisations by name, as the Compacter code base defines them."""

from __future__ import annotations

import math

from torch import Tensor, nn

from opendelta.exceptions import ConfigError, nearest

WEIGHT_INITIALISATIONS = ("normal", "glorot-uniform", "glorot-normal")


def initialise(weight: Tensor, how: str, std: float, argument: str) -> None:
    """Fill a matrix, or each matrix of a stack, in place.

    Args:
        weight: shape (rows, columns) or (stack, rows, columns).
        how: ``"glorot-uniform"`` or ``"glorot-normal"`` (gain sqrt 2), or ``"normal"`` (`std`).
        std: for ``"normal"``.
        argument: the hyper-parameter's name, for the error message.

    Raises:
        ConfigError: for another `how`.
    """
    if how == "normal":
        nn.init.normal_(weight, std=std)
        return
    fill = {"glorot-uniform": nn.init.xavier_uniform_, "glorot-normal": nn.init.xavier_normal_}
    if how not in fill:
        raise ConfigError(
            f"{argument}={how!r}: expected one of {', '.join(WEIGHT_INITIALISATIONS)}."
            + nearest(how, WEIGHT_INITIALISATIONS)
        )
    for matrix in weight if weight.dim() == 3 else [weight]:
        fill[how](matrix, gain=math.sqrt(2))
