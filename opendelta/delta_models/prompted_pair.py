"""What a soft prompt before the encoder's text needs elsewhere in an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from opendelta.delta_models.prompt_places import Places
from opendelta.ground.containers import Args, Kwargs


class TrimEncoder(nn.Module):
    """On an encoder-decoder: cuts the encoder's states that it returns to the text."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


def trim_encoder(
    delta: TrimEncoder, host: nn.Module, args: Args, kwargs: Kwargs, output: Any
) -> Any:
    """After an encoder-decoder that ran its encoder: cut the encoder's states to the text."""
    if not isinstance(output, Mapping) or kwargs.get("encoder_outputs") is not None:
        return output
    cut = dict(output)
    if isinstance(cut.get("encoder_last_hidden_state"), Tensor):
        cut["encoder_last_hidden_state"] = cut["encoder_last_hidden_state"][:, delta.count :]
    if cut.get("encoder_hidden_states") is not None:
        cut["encoder_hidden_states"] = tuple(
            state[:, delta.count :] for state in cut["encoder_hidden_states"]
        )
    return type(output)(**cut)


class CrossMask(nn.Module):
    """On a decoder: makes the encoder's mask as long as the prompted encoder's output.

    Args:
        count: length of the prompt.
        names: of the decoder's arguments, in order.
    """

    def __init__(self, count: int, names: list[str]) -> None:
        super().__init__()
        self.count, self.names = count, names
        masks = (n for n in names if n.startswith("encoder_") and n.endswith("mask"))
        self.mask = next(masks, "encoder_attention_mask")

    def pre_forward(self, *args: Any, **kwargs: Any) -> tuple[Args, Kwargs]:
        """The decoder's arguments, in which the encoder's mask is longer by the prompt."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        mask, states = given.get(self.mask), given.get("encoder_hidden_states")
        if not (isinstance(mask, Tensor) and isinstance(states, Tensor) and mask.dim() == 2):
            return args, kwargs
        missing = min(self.count, states.shape[1] - mask.shape[1])
        if missing <= 0:
            return args, kwargs
        longer = Places.before_text(missing, mask.shape[1], mask).put(mask, 1)
        if self.mask in kwargs:
            return args, {**kwargs, self.mask: longer}
        at = self.names.index(self.mask)
        return (*args[:at], longer, *args[at + 1 :]), kwargs
