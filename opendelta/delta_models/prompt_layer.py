"""The layers of a soft prompt: the prompt itself, and the further modules at which it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opendelta.delta_models.prompt_network import PromptNetwork
from opendelta.delta_models.prompt_places import Places

LAYER, PROMPT, NETWORK = "soft_prompt_layer", "soft_embeds", "network"  # what it is called in files
PROMPT_KEY = f"{LAYER}.{PROMPT}"


class Site(nn.Module):
    """On a module at which a call may get longer.

    Args:
        names: of the host's positional arguments, in order.
        embedding: name of the token embedding below the host, where that takes embeddings; None
            where it is handed ids.
        cuts: whether its output is cut to the text in any case.
        is_spare: whether it acts only where no site further out was called.

    Attributes:
        places, leads: in compiled code, where no call is noted: where the prompt is in the call
            that runs, and whether this site made it longer.
    """

    passes_on = True  # no call need come by

    def __init__(
        self, names: list[str], embedding: str | None, cuts: bool, is_spare: bool = False
    ) -> None:
        super().__init__()
        self.names, self.embedding = names, embedding
        self.cuts, self.is_spare = cuts, is_spare
        self.places: Places | None = None
        self.leads = False

    @property
    def prompt(self) -> SoftPromptLayer:
        """The prompt that comes in."""
        raise NotImplementedError


class SoftPromptLayer(Site):
    """The prompt, on the model that it is for.

    Parameters: `soft_embeds` (tokens, embedding width); those of `network`, where one generates it.

    Args:
        soft_embeds: the initial prompt, or the `PromptNetwork` that generates it.
        expand: arguments of shape (batch, tokens, ...) that get longer, and their value there.
        prompt_id: what stands for it among ids, below 0.
        room: how many positions the model has learned, None for any number.
        counts_positions: whether the model is told positions where the caller tells none.
        options: see `Site`.

    Attributes:
        is_entered: whether some site has made the call that runs longer, for compiled code.
    """

    def __init__(
        self,
        soft_embeds: Tensor | PromptNetwork,
        expand: Mapping[str, int],
        prompt_id: int,
        room: int | None,
        counts_positions: bool,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(soft_embeds, PromptNetwork):
            self.network: PromptNetwork | None = soft_embeds
            self.count = soft_embeds.embedding.num_embeddings
        else:
            self.soft_embeds, self.network = nn.Parameter(soft_embeds), None
            self.count = len(soft_embeds)
        self.expand = dict(expand)
        self.prompt_id, self.room, self.counts_positions = prompt_id, room, counts_positions
        self.mark: list[Any] = []  # what its replicas share
        self.is_entered = False

    @property
    def prompt(self) -> SoftPromptLayer:
        return self

    def extra_repr(self) -> str:
        way = "in the place of ids" if self.embedding is None else "as embeddings"
        return f"tokens={self.count}, enters {way}"

    def values(self) -> Tensor:
        """The prompt as it is now, (tokens, width)."""
        return self.soft_embeds if self.network is None else self.network()

    def forward(self, values: Tensor, places: Places | Tensor) -> Tensor:
        """The embeddings `values` with the prompt among them.

        Args:
            values: (batch, tokens, width), of the text alone; or of as many positions as there are.
            places: where the prompt comes between them; or which of them are the prompt's.
        """
        prompt = self.values().to(values)
        if isinstance(places, Places):
            return places.put(values, prompt)
        rank = (places.cumsum(-1) - 1) % self.count
        return torch.where(places.unsqueeze(-1), prompt[rank], values)


class FurtherSite(Site):
    """A site beside that of the prompt itself: inside its model, or around it.

    Args:
        layer: the prompt; `home`: its model.
        options: see `Site`.
    """

    def __init__(self, layer: SoftPromptLayer, home: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self._prompt, self.home = [layer], [home]  # children of others, not of this one

    @property
    def prompt(self) -> SoftPromptLayer:
        return self._prompt[0]
