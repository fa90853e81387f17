"""Which of several deltas acts on which row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
