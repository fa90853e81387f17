"""Which of several deltas acts on which row of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.exceptions import InsertionError


class Rows:
    """Which of several deltas acts on which row.

    Args:
        of_row: for each row of the list the position of its delta among `count`; `count` where none
            of them acts.
        count: the number of deltas.
        name_of: the name of a module of the backbone.
    """

    def __init__(self, of_row: list[int], count: int, name_of: Callable[[nn.Module], str]) -> None:
        self.of_row, self.count, self._name_of = of_row, count, name_of
        self._indices: dict[tuple[torch.device, int], Tensor] = {}
        self._members: dict[tuple[torch.device, int], tuple[list[Tensor], Tensor]] = {}

    def __len__(self) -> int:
        return len(self.of_row)

    @property
    def all_one(self) -> bool:
        """Whether one delta acts on every row."""
        return self.of_row == [0] * len(self)

    def repeats(self, hidden: Tensor, host: nn.Module) -> int:
        """How many entries of `hidden`, (entries, ...), belong to each row.

        Raises:
            InsertionError: if it does not consist of the rows.
        """
        if hidden.is_nested:
            raise InsertionError(
                f"{self._name_of(host)!r} is called with a nested tensor, which route() cannot "
                "take apart: give nn.TransformerEncoder enable_nested_tensor=False."
            )
        entries = hidden.shape[0] if hidden.dim() else 0
        if not entries or entries % len(self):
            raise InsertionError(
                f"{self._name_of(host)!r} is called with a tensor of shape {tuple(hidden.shape)}, "
                f"whose first dimension is no multiple of the {len(self)} rows: whose entries "
                "these are cannot be told (experts are called so, and positions that all rows "
                "share). Leave this module out with exclude_modules, or run the rows apart."
            )
        return entries // len(self)

    def pick(self, tensors: Sequence[Tensor], repeats: int = 1) -> Tensor:
        """For each entry the tensor of its delta, zeros for none.

        Args:
            tensors: one for each delta, of one shape.

        Returns:
            A tensor of shape (rows * repeats, *shape).
        """
        index = self._index(tensors[0].device, repeats)
        return torch.stack([*tensors, torch.zeros_like(tensors[0])]).index_select(0, index)

    def _index(self, device: torch.device, repeats: int) -> Tensor:
        key = device, repeats
        if key not in self._indices:
            index = torch.tensor(self.of_row, device=device)
            self._indices[key] = index.repeat_interleave(repeats)
        return self._indices[key]

    def members(self, device: torch.device, repeats: int) -> tuple[list[Tensor], Tensor]:
        """The entries of each delta and then those of none; where each entry is in that order."""
        key = device, repeats
        if key not in self._members:
            index = self._index(torch.device("cpu"), repeats)
            parts = [(index == number).nonzero().flatten() for number in range(self.count + 1)]
            inverse = torch.cat(parts).argsort()
            self._members[key] = [part.to(device) for part in parts], inverse.to(device)
        return self._members[key]

    def share(self, number: int, value: Tensor) -> Tensor:
        """The entries of `value` for one delta (`count` for those of none), if it goes by rows."""
        entries = value.shape[0] if value.dim() else 0
        if not entries or entries % len(self):
            return value
        members, _ = self.members(value.device, entries // len(self))
        return value.index_select(0, members[number])


# --- taking rows out of arguments and outputs, and putting them back ------------------------------


def selected(value: Any, members: Tensor, entries: int) -> Any:
    """`value` with only some rows of the tensors in it that have `entries` of them."""
    if isinstance(value, Tensor):
        is_by_row = value.dim() and value.shape[0] == entries
        return value.index_select(0, members.to(value.device)) if is_by_row else value
    return _rebuilt(value, lambda key: selected(value[key], members, entries))


def joined(whole: Any, before: list[Any], after: list[Any], sizes: list[int], at: Tensor) -> Any:
    """The results of several parts of `whole` in one, what did not change taken from `whole`.

    Args:
        whole: what the parts were taken from.
        before, after: the parts, and what became of them.
        sizes: how many rows each has; `at`: where each row of the whole is among theirs.

    Raises:
        ValueError, TypeError, RuntimeError: if they do not fit together.
    """
    if all(new is old for new, old in zip(after, before, strict=True)):
        return whole
    first = after[0]
    if any(type(new) is not type(first) for new in after):
        raise TypeError(f"types {sorted({type(new).__name__ for new in after})}")
    if isinstance(first, Tensor):
        was_shared = isinstance(whole, Tensor) and whole.shape[:1] != at.shape
        if not was_shared and [new.shape[:1] for new in after] == [(size,) for size in sizes]:
            return torch.cat(after).index_select(0, at.to(first.device))
        if not all(torch.equal(new, first) for new in after):
            raise ValueError(f"a tensor of shape {tuple(first.shape)} that all rows share")
        return first

    def item(key: Any) -> Any:
        olds = [_item(old, key) for old in before]
        return joined(_item(whole, key), olds, [new[key] for new in after], sizes, at)

    return _rebuilt(first, item)


def _item(container: Any, key: Any) -> Any:
    """``container[key]``, None where there is none."""
    try:
        return container[key]
    except (IndexError, KeyError, TypeError):
        return None


def _rebuilt(container: Any, item: Callable[[Any], Any]) -> Any:
    """A tuple, list or mapping of the same kind with ``item(key)`` for each key; others as is."""
    if isinstance(container, (tuple, list)):
        items = [item(position) for position in range(len(container))]
        return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)
    if isinstance(container, Mapping):
        made: Any = copy.copy(container)
        for key in container:
            made[key] = item(key)
        return made
    return container
