"""Where in the rows of a batch a soft prompt comes."""

from __future__ import annotations

import torch
from torch import Tensor

from opendelta.exceptions import InsertionError


class Places:
    """Which positions of the longer rows are the text's; the prompt's are the others.

    Args:
        count: length of the prompt.
        total: how many positions a row gets.
        text: the new position of each of the text, (batch, tokens), or None where the prompt is in
            front of every row.
    """

    def __init__(self, count: int, total: int, text: Tensor | None = None) -> None:
        self.count, self.total, self.text = count, total, text
        self.order = self.rank = None
        if text is not None:
            indices = torch.arange(text.shape[1], device=text.device).expand_as(text)
            empty = text.new_full((text.shape[0], total), -1)
            self.order = empty.scatter(1, text, indices)  # of the text's positions, else -1
            self.rank = ((self.order < 0).cumsum(1) - 1) % count  # of the prompt's positions

    @classmethod
    def before_text(cls, count: int, tokens: int, mask: Tensor | None) -> Places:
        """Right before the text of each row: after its padding on the left.

        Args:
            count: length of the prompt.
            tokens: of a row.
            mask: (batch, tokens), 0 at padding; None for none.
        """
        if mask is None:
            return cls(count, tokens + count)
        shown = (mask != 0).cumsum(1) > 0
        return cls(count, tokens + count, torch.arange(tokens, device=mask.device) + count * shown)

    @classmethod
    def before_each(cls, count: int, starts: Tensor) -> Places:
        """Before each of several texts in a row.

        Args:
            count: length of the prompt.
            starts: (batch, tokens), whether a text begins there; the first does.

        Raises:
            InsertionError: if rows hold different numbers of texts.
        """
        texts = starts.sum(1).tolist()
        if len(set(texts)) > 1:
            raise InsertionError(
                f"position_ids start again within rows, which hold {texts} texts: a soft prompt "
                "before each would make the rows unequally long. Pack as many into each, or all "
                "into one row."
            )
        tokens = starts.shape[1]
        text = torch.arange(tokens, device=starts.device) + count * starts.cumsum(1)
        return cls(count, tokens + count * texts[0], text)

    def put(self, values: Tensor, prompt: Tensor | float) -> Tensor:
        """`values` of the text with those of the prompt among them, a new tensor.

        Args:
            values: (batch, tokens, ...).
            prompt: one number, or (count, ...).
        """
        if self.order is None or self.rank is None:
            front = values.new_empty(values.shape[0], self.count, *values.shape[2:])
            front[:] = prompt
            return torch.cat([front, values], 1)
        trailing = (1,) * (values.dim() - 2)
        index = self.order.clamp(min=0).view(*self.order.shape, *trailing)
        text = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
        own = prompt[self.rank] if isinstance(prompt, Tensor) else prompt
        return torch.where((self.order < 0).view(*self.order.shape, *trailing), own, text)

    def moved(self, positions: Tensor) -> Tensor:
        """Positions (batch, tokens) of the text, moved, with those of the prompt right before."""
        if self.order is None or self.rank is None:
            own = torch.arange(self.count, device=positions.device)
            return torch.cat([positions[:, :1] + own, positions + self.count], 1)
        coming = (self.order >= 0).cumsum(1).clamp(max=positions.shape[1] - 1)
        own = positions.gather(1, coming) + self.rank  # as the text that comes next would have had
        return torch.where(
            self.order < 0, own, positions.gather(1, self.order.clamp(min=0)) + self.count
        )

    def cut(self, values: Tensor) -> Tensor:
        """Those of the text among `values`, (batch, positions, ...)."""
        if self.text is None:
            return values[:, self.count :]
        index = self.text.view(*self.text.shape, *(1,) * (values.dim() - 2))
        return values.gather(1, index.expand(-1, -1, *values.shape[2:]))
