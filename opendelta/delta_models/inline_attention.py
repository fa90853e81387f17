"""Prefixes for attention that a model computes inline, outside transformers' attention lookup.

`InlineAttention` watches the torch functions that run inside one attention module. It joins the
prefix's logits to the scores at the softmax, and adds the prefix's values at the product that
follows; calls of `F.scaled_dot_product_attention` get longer keys, values and masks. Masks and
relative positions of the text need no change: they act on scores before the softmax, and are zero
at prefix positions (DeBERTa-v2; with ALiBi that makes the prefix as near as the first position,
which with left padding is further off in MPT, whose bias counts the padding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from opendelta.delta_models.prefixed_call import PrefixedCall

_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
_PRODUCTS_ONTO = {torch.baddbmm, Tensor.baddbmm}  # (onto, query, key, *, beta, alpha)
_SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__}
_SCALINGS: dict[Any, int] = {
    torch.mul: 1,
    Tensor.mul: 1,
    Tensor.__mul__: 1,
    Tensor.mul_: 1,
    torch.div: -1,
    Tensor.div: -1,
    Tensor.div_: -1,
    Tensor.__truediv__: -1,
}


class InlineAttention(PrefixedCall, TorchFunctionMode):
    """Joins a prefix to the attention computed inline in one call of a module.

    Args:
        host, key, value, visible: see `PrefixedCall`.
    """

    def __init__(
        self, host: nn.Module, key: Tensor, value: Tensor, visible: Tensor | None = None
    ) -> None:
        PrefixedCall.__init__(self, host, key, value, visible)
        TorchFunctionMode.__init__(self)
        self._scaled: list[tuple[Tensor, Any]] = []  # what was multiplied, and by what factor
        self._query: Tensor | None = None
        self._factor: Any = 1.0
        self._bias: Any = 0.0
        self._scores: list[Tensor] = []  # the scores on their way to the softmax
        self._probabilities: list[Tensor] = []  # ... and from there to the product with values
        self._prefix_probabilities: Tensor | None = None

    def start(self) -> None:
        """Act from now on."""
        self.__enter__()

    def stop(self) -> None:
        """Act no longer."""
        self.__exit__(None, None, None)

    def abandon(self) -> None:
        """`stop`, unless something else was put on top meanwhile."""
        if _get_current_function_mode() is self:
            self.stop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_over:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func in _SOFTMAXES and args and _among(args[0], self._scores):
            return self._softmax(func, args, kwargs)
        if func in _PRODUCTS and args and _among(args[0], self._probabilities):
            return self._weigh(func(*args, **kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and args and isinstance(args[0], Tensor):
            self._follow(func, args, kwargs, result)
        return result

    def _follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, result: Tensor
    ) -> None:
        """Note what became of keys, scores and probabilities."""
        if func in _PRODUCTS_ONTO and self._query is None:
            self._query = kwargs["batch1"] if "batch1" in kwargs else args[1]
            self._factor, self._scores = kwargs.get("alpha", 1.0), [result]
        elif func in _PRODUCTS and _are_stacks(args) and self._query is None:
            self._query, self._scores = args[0], [result]
            self._factor = next((f for t, f in self._scaled if t is args[1]), 1.0)
        elif func in _SCALINGS and len(args) > 1 and _is_scalar(args[1]):
            factor = args[1] ** _SCALINGS[func]
            before = next((f for t, f in self._scaled if t is args[0]), 1.0)
            self._scaled.append((result, before * factor))
            if _among(args[0], self._scores):
                self._factor, self._bias = self._factor * factor, self._bias * factor
                self._scores.append(result)
        elif any(_among(a, self._scores) for a in args) and result.is_floating_point():
            self._scores.append(result)
            if func in _SUMS and _is_for_heads(args[1], result):
                self._bias = self._bias + args[1][..., :1]
        elif _among(args[0], self._probabilities):
            self._probabilities.append(result)
            if func is F.dropout and self._prefix_probabilities is not None:
                rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
                training = kwargs.get("training", args[2] if len(args) > 2 else True)
                self._prefix_probabilities = F.dropout(self._prefix_probabilities, rate, training)
        else:  # a view of a scaled key is scaled
            factor = next((f for t, f in self._scaled if t is args[0]), None)
            if factor is not None:
                self._scaled.append((result, factor))

    def _softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Tensor:
        scores, query = args[0], self._query
        assert query is not None
        logits = (query @ _heads(self.key, query).transpose(-1, -2)) * self._factor
        logits = logits + self._bias
        if self.visible is not None:
            logits = logits.masked_fill(~_by_row(self.visible, query), -torch.inf)
        logits = logits.to(scores.dtype).reshape(*scores.shape[:-1], -1)
        both = func(torch.cat([logits, scores], -1), *args[1:], **kwargs)
        self._prefix_probabilities = both[..., : self.tokens]
        result = both[..., self.tokens :]
        self._probabilities, self._scores, self._query, self._bias = [result], [], None, 0.0
        return result

    def _weigh(self, context: Tensor) -> Tensor:
        """The product of probabilities and values, the prefix's part added."""
        weights = self._prefix_probabilities
        assert weights is not None
        weights = weights.reshape(*context.shape[:-1], -1).to(context.dtype)
        self._probabilities, self._prefix_probabilities, self.joined = [], None, True
        return context + weights @ _heads(self.value, context)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        self.joined = True
        key = torch.cat([_heads(self.key, key), key], -2)
        value = torch.cat([_heads(self.value, value), value], -2)
        count = self.tokens
        if is_causal:
            lengths = query.shape[-2], key.shape[-2] - count
            attn_mask = torch.ones(lengths, dtype=torch.bool, device=query.device).tril()
        if attn_mask is None and self.visible is not None:  # one that shows all the text
            attn_mask = query.new_zeros(*[1] * (query.dim() - 1), key.shape[-2] - count)
        if attn_mask is not None:
            attn_mask = widen(attn_mask, count, self.visible)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)


def widen(mask: Tensor, count: int, visible: Tensor | None = None) -> Tensor:
    """A mask (batch or 1, ..., keys), boolean or additive, with `count` positions in front.

    Args:
        visible: which of them each row sees, (batch, count); None for all.
    """
    shown: float = True if mask.dtype == torch.bool else 1
    hidden: float = False if mask.dtype == torch.bool else 0
    if mask.is_floating_point():
        shown, hidden = 0, -torch.inf
    wide = F.pad(mask, (count, 0), value=shown)
    if visible is None:
        return wide
    seen = F.pad(visible, (0, mask.shape[-1]), value=True)
    return torch.where(_by_row(seen, mask), wide, hidden)


def _by_row(visible: Tensor, like: Tensor) -> Tensor:
    """(batch, tokens) as (batch, 1, ..., tokens) with as many dimensions as `like`.

    Args:
        like: of that batch (or 1), or, with 3 dimensions, of (batch * heads).
    """
    if like.dim() == 3:
        visible = visible.repeat_interleave(max(1, like.shape[0] // visible.shape[0]), 0)
    return visible.view(visible.shape[0], *[1] * (like.dim() - 2), visible.shape[1])


def _heads(prefix: Tensor, like: Tensor) -> Tensor:
    """A prefix (tokens, width) as (..., tokens, head width), with leading dimensions as `like` has.

    It is of the dtype of `like`, and on its device.

    Args:
        prefix: may also be (batch, tokens, width).
        like: (batch, heads, ..., positions, head width) or (batch * heads, positions, head width).
    """
    split = prefix.to(like).unflatten(-1, (-1, like.shape[-1])).transpose(-3, -2)
    heads = split.shape[-3]
    if like.dim() == 3:
        split = split.reshape(-1, *split.shape[-2:])
        return split.repeat(like.shape[0] // split.shape[0], 1, 1)
    if like.shape[1] % heads == 0:  # heads of queries may share those of keys
        split = split.repeat_interleave(like.shape[1] // heads, -3)
    split = split.view(*split.shape[:-2], *[1] * (like.dim() - 4), *split.shape[-2:])
    return split.expand(like.shape[0], -1, *like.shape[2:-2], -1, -1)


def _among(value: Any, tensors: list[Tensor]) -> bool:
    return any(value is tensor for tensor in tensors)


def _is_for_heads(term: Any, scores: Tensor) -> bool:
    """Whether an addend is (heads, ..., keys), the same for all texts: distances counted from the
    last key (MPT), which the prefix must not be nearer to as the text grows."""
    return isinstance(term, Tensor) and term.dim() == scores.dim() - 1 and term.shape[0] > 1


def _are_stacks(factors: tuple[Any, ...]) -> bool:
    """Whether two tensors are stacks of matrices: a weight, shared by the batch, is none."""
    return all(isinstance(f, Tensor) and f.dim() >= 3 for f in factors[:2])


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)
