"""Where the hidden state is among a module's arguments and in its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opendelta.exceptions import InsertionError

Args = tuple[Any, ...]

Kwargs = dict[str, Any]


def locate_hidden(args: Args, kwargs: Kwargs) -> int | str:
    """Where the hidden state is among a module's arguments: a position or a keyword.

    It is the first argument, ``hidden_states``, the first float tensor, or the first tensor.

    Raises:
        InsertionError: if no argument is a tensor.
    """
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [(where, value) for where, value in named if isinstance(value, Tensor)]
    if not tensors:
        raise InsertionError("The modified module is called without any tensor: there is no input.")
    return next((where for where, v in tensors if v.is_floating_point()), tensors[0][0])


def first_hidden(args: Args, kwargs: Kwargs) -> Tensor:
    """The hidden state among a module's arguments, see `locate_hidden`."""
    where = locate_hidden(args, kwargs)
    found: Tensor = args[where] if isinstance(where, int) else kwargs[where]
    return found


def map_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with its hidden state replaced by ``change(hidden)``.

    The hidden state is the output itself, the first element of a tuple or list, or the first
    floating-point tensor of a dict or ``ModelOutput``. The caller's containers are not changed.

    Raises:
        InsertionError: if there is no tensor at these places.
    """
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        changed = [change(output[0]), *output[1:]]
        if hasattr(output, "_fields"):  # a namedtuple takes its fields one by one
            return type(output)(*changed)
        return type(output)(changed)
    if isinstance(output, Mapping):
        for key, value in output.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                changed_items = {**output, key: change(value)}
                if all(isinstance(name, str) for name in changed_items):
                    return type(output)(**changed_items)  # a ModelOutput takes keywords alone
                return type(output)(changed_items)  # type: ignore[call-arg]
    raise InsertionError(
        f"The modified module returned a {type(output).__name__}; expected a tensor, or a tuple, "
        "list, dict or ModelOutput whose first tensor is the hidden state."
    )


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a module's output, see `map_hidden`."""
    seen: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    map_hidden(output, note)
    return seen[0]


def by_row(change: Callable[..., Tensor], hidden: Tensor, *others: Tensor) -> Tensor:
    """``change(hidden, *others)``; of strided nested tensors, each row by itself.

    `nn.TransformerEncoder` makes such of a padded batch in evaluation, and few operations take
    them. A row keeps its dimension: it is a batch of one.
    """
    if not hidden.is_nested or hidden.layout is not torch.strided:
        return change(hidden, *others)
    rows = zip(*(tensor.unbind() for tensor in (hidden, *others)), strict=True)
    made = [change(*(part[None] for part in row))[0] for row in rows]
    return torch.nested.as_nested_tensor(made)
