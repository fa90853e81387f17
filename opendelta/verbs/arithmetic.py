"""Sums of what deltas of one method hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opendelta.delta.delta import Delta
from opendelta.exceptions import ConfigError


def require_equal_hyperparameters(deltas: Sequence[Delta]) -> None:
    """Refuse deltas whose method was set differently.

    Raises:
        ConfigError: naming the field and its values.
    """
    for name in deltas[0].config.method_fields:
        values = [getattr(delta.config, name, None) for delta in deltas]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"{name} differs ({', '.join(map(repr, values))}): the parameters of "
                f"{type(deltas[0]).__name__} add up only if its hyper-parameters are equal."
            )


def besides(delta: Delta) -> dict[str, Tensor]:
    """What a delta has that its method did not put there: name in a file -> tensor."""
    others = [insertion for insertion in delta.insertions if not insertion.of_method]
    return {name: t for insertion in others for name, t in insertion.named_tensors()}


def weighted_sums(deltas: Sequence[Delta], weights: Sequence[float]) -> dict[str, Tensor]:
    """Name in a saved file -> weighted sum of the deltas' tensors of that name.

    Sums are computed in float32 or wider. Tensors that never train are not summed.

    Raises:
        ConfigError: if the deltas' tensors do not have the same names and shapes, or one that
            never trains is not the same in all.
    """
    apart = {name for delta in deltas for name in besides(delta)}
    tensors = [
        {n: t.detach() for n, t in delta.own_tensors() if n not in apart} for delta in deltas
    ]
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in tensors]
    for other in shapes:
        unlike = sorted(name for name, _ in other.items() ^ shapes[0].items())
        if unlike:
            raise ConfigError(
                "The deltas do not sit on the same modules, or not with the same shapes: they "
                f"differ in {unlike[0]}{f' and {len(unlike) - 1} more' * (len(unlike) > 1)}."
            )
    constant = {tensor.data_ptr() for i in deltas[0].insertions for tensor in i.constants()}
    sums = {}
    for name, tensor in tensors[0].items():
        terms = [each[name].to(tensor.device) for each in tensors]
        if tensor.data_ptr() in constant or not tensor.is_floating_point():
            if not all(torch.equal(term, tensor) for term in terms):
                raise ConfigError(f"{name} never trains and must be the same in all deltas.")
            sums[name] = tensor.clone()
        else:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            total = sum(w * term.to(wide) for w, term in zip(weights, terms, strict=True))
            assert isinstance(total, Tensor)
            sums[name] = total.to(tensor.dtype)
    return sums
