"""At the token embedding: where a soft prompt takes the place of the ids that stand for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opendelta.delta_models.prompt_layer import SoftPromptLayer
from opendelta.delta_models.prompted_call import running
from opendelta.exceptions import InsertionError
from opendelta.ground.containers import Args, Kwargs, first_hidden
from opendelta.ground.seams import forward_of


class Entrance(nn.Module):
    """On the token embedding: puts the prompt where ids stand for it, and sees what was missed.

    Args:
        layer: the prompt; `home`: the model that it is for.
        by_ids: whether ids stand for it in compiled code, where no call is noted.
        is_shared: whether another model beside that one may use the embedding.

    Attributes:
        standing_in: in compiled code, which ids of a call stand for the prompt.
    """

    def __init__(
        self, layer: SoftPromptLayer, home: nn.Module, by_ids: bool, is_shared: bool
    ) -> None:
        super().__init__()
        self.prompt, self.home = [layer], [home]  # children of others, not of this one
        self.by_ids, self.is_shared = by_ids, is_shared
        self.standing_in: Tensor | None = None

    @staticmethod
    def routed(
        entrances: list[Entrance], rows: Any, host: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """All on the whole batch: which positions are whose, the ids tell."""
        for entrance in entrances:
            args, kwargs = stand_in(entrance, host, args, kwargs)
        return args, kwargs


def stand_in(
    entrance: Entrance, embedding: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Before the embedding: note which ids stand for the prompt, and hand it others for them.

    Raises:
        InsertionError: where the forward of the model was called past its hooks.
    """
    layer = entrance.prompt[0]
    is_compiling, call = torch.compiler.is_compiling(), running(layer)
    if not (layer.is_entered or entrance.is_shared if is_compiling else call is not None):
        _require_not_missed(entrance)
    holder: Any = entrance if call is None else call
    holder.standing_in = None
    by_ids = entrance.by_ids if call is None else call.site.embedding is None
    ids = first_hidden(args, kwargs)
    if not by_ids or ids.is_floating_point() or (call is None and not is_compiling):
        return args, kwargs
    holder.standing_in = ids == layer.prompt_id
    valid = torch.where(holder.standing_in, 0, ids)
    if args:
        return (valid, *args[1:]), kwargs
    return args, {name: valid if value is ids else value for name, value in kwargs.items()}


class FillIn:
    """After the embedding and all deltas on it: puts the prompt where ids stood for it.

    Args:
        entrance: which noted the places; on a replica, and on a copy, it is a child there.
    """

    def __init__(self, entrance: Entrance) -> None:
        self.entrance = entrance

    def __call__(self, embedding: nn.Module, args: Any, output: Any) -> Any:
        here = [child for child in embedding._modules.values() if isinstance(child, Entrance)]
        for entrance in dict.fromkeys([*here, self.entrance]):  # in a route it may be detached
            call = running(entrance.prompt[0])
            holder: Any = entrance if call is None else call
            places, holder.standing_in = holder.standing_in, None
            if places is not None and output is not None:
                layer = entrance.prompt[0] if call is None else call.site.prompt
                output = layer(output, places)
        return output


def _require_not_missed(entrance: Entrance) -> None:
    """Refuse a forward of the prompted model in which no site was called.

    Compiled code breaks off here: it has no frames to look at.
    """
    (home,) = entrance.home
    if forward_of(home) is not None:
        raise InsertionError(
            f"{type(home).__name__}.forward was called past its hooks, so that the soft prompt "
            "would not act. Call the model itself, model(...); where a wrapper calls forward (as "
            "SentenceTransformer and CrossEncoder do), construct the delta on the wrapper."
        )
