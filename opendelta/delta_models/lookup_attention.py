"""Prefixes for attention that a model gets from transformers' attention lookup.

While a prefixed attention module runs, the lookup hands out a function that joins the prefix to
keys and values and widens the mask; the backbone's config, cache and positions know nothing of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.delta_models.inline_attention import widen
from opendelta.delta_models.prefixed_call import PrefixedCall, running_call
from opendelta.exceptions import InsertionError

_WITHOUT_CAUSAL_MASK = ("eager", "flash")  # the first is causal by its mask alone, the second
# aligns its own to the last position


class LookupAttention(PrefixedCall):
    """Joins a prefix to what the lookup's functions compute in one call of a module.

    Args:
        host, key, value, visible: see `PrefixedCall`.
        relative: the module whose `compute_bias` gives the relative position bias of this
            attention, if it has one.
        past: how many tokens of the text were cached before the call.
    """

    def __init__(
        self,
        host: nn.Module,
        key: Tensor,
        value: Tensor,
        relative: Any = None,
        past: int | Tensor = 0,
        visible: Tensor | None = None,
    ) -> None:
        super().__init__(host, key, value, visible)
        self.relative, self.past = relative, past

    def attend(
        self,
        implementation: str,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """What the lookup's `function` computes with the prefix joined.

        Args:
            implementation: the name of `function` in the lookup.
            query: (batch, heads, queries, head width); `key`, `value`: (batch, key heads, keys,
                head width).
            attention_mask: boolean or additive, (batch or 1, heads or 1, queries, keys), or None.
        """
        self.joined = True
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise InsertionError(
                f"attn_implementation={implementation!r} masks by a "
                f"{type(attention_mask).__name__}, which a prefix cannot widen. Load the backbone "
                'with attn_implementation="sdpa" or "eager".'
            )
        window, keys = kwargs.get("sliding_window"), key.shape[-2]
        if "flash" in implementation and window is not None and keys + self.tokens > window:
            raise InsertionError(
                f"attn_implementation={implementation!r} slides its window of {window} tokens "
                "without a mask, so that late tokens would not see the prefix. Load the backbone "
                'with attn_implementation="sdpa" or "eager".'
            )
        if attention_mask is None and query.shape[-2] > 1:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            if causal and not any(name in implementation for name in _WITHOUT_CAUSAL_MASK):
                attention_mask = _causal_mask(query, key)
        if attention_mask is None and self.visible is not None:  # one that shows all the text
            if "flash" in implementation:
                attention_mask = torch.ones(len(key), key.shape[-2], device=key.device)
            else:
                attention_mask = query.new_zeros(1, 1, 1, key.shape[-2])
        if attention_mask is not None:
            attention_mask = widen(attention_mask, self.tokens, self.visible)
        bias = kwargs.get("position_bias")
        if bias is not None:
            kwargs["position_bias"] = torch.cat([self._prefix_bias(bias), bias], -1)
        key = torch.cat([_to_heads(self.key, key), key], -2)
        value = torch.cat([_to_heads(self.value, value), value], -2)
        return function(module, query, key, value, attention_mask, **kwargs)

    def _prefix_bias(self, bias: Tensor) -> Tensor:
        """Relative position bias of the prefix, as of the tokens right before the text.

        Args:
            bias: that of the text, (1 or batch, heads, queries, keys).
        """
        if self.relative is None:
            return bias.new_zeros(*bias.shape[:-1], self.tokens)
        columns: Tensor = self.relative.compute_bias(
            bias.shape[-2], self.tokens, bias.device, past_seen_tokens=self.past + self.tokens
        )
        return columns.to(bias).expand(bias.shape[0], -1, -1, -1)


def watch_attention_lookup() -> None:
    """Make transformers' attention lookup regard the prefix of the module that runs."""
    from transformers.modeling_utils import AttentionInterface

    lookup = AttentionInterface.get_interface
    if getattr(lookup, "regards_prefixes", False):
        return

    @functools.wraps(lookup)
    def get_interface(self: Any, attn_implementation: str, default: Any) -> Callable[..., Any]:
        function: Callable[..., Any] = lookup(self, attn_implementation, default)
        call = running_call()
        if not isinstance(call, LookupAttention):
            return function
        return functools.partial(call.attend, attn_implementation or "eager", function)

    get_interface.regards_prefixes = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


def _causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """What SDPA's own causal mask shows; that one starts at the top left, where the prefix is."""
    return torch.ones(
        1, 1, query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device
    ).tril()


def _to_heads(prefix: Tensor, like: Tensor) -> Tensor:
    """(tokens, width), or that by row, as (batch, heads, tokens, head width) like `like`."""
    batch, heads, _, depth = like.shape
    split = prefix.to(like).unflatten(-1, (heads, depth)).transpose(-3, -2)
    return split.expand(batch, -1, -1, -1)
