"""The networks that may generate a soft prompt while it is trained (P-tuning).

Liu et al. 2021, https://arxiv.org/abs/2103.10385.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn

KINDS = ("mlp", "lstm")


class PromptNetwork(nn.Module):
    """Generates a prompt (tokens, width) from one embedding for each of its positions.

    ``"mlp"``: three linears, width -> mid_dim -> mid_dim -> width, with ReLU between. ``"lstm"``:
    two bidirectional layers of mid_dim over the positions, then two linears, 2 mid_dim -> 2 mid_dim
    -> width, with ReLU between.

    Args:
        initial: what the embeddings start as, (tokens, width).
        kind: ``"mlp"`` or ``"lstm"``.
        mid_dim: width of the hidden layers.
    """

    def __init__(self, initial: Tensor, kind: str, mid_dim: int) -> None:
        super().__init__()
        tokens, width = initial.shape
        self.embedding = nn.Embedding(tokens, width)
        self.embedding.weight.data.copy_(initial.detach())
        self.lstm = None
        layers: list[int] = [width, mid_dim, mid_dim, width]
        if kind == "lstm":
            self.lstm = nn.LSTM(width, mid_dim, 2, batch_first=True, bidirectional=True)
            layers = [2 * mid_dim, 2 * mid_dim, width]
        parts: list[nn.Module] = []
        for one, next_one in itertools.pairwise(layers):
            parts += [nn.Linear(one, next_one), nn.ReLU()]
        self.mlp = nn.Sequential(*parts[:-1])

    def forward(self) -> Tensor:
        """The prompt, (tokens, width)."""
        values: Tensor = self.embedding.weight
        if self.lstm is not None:
            values = self.lstm(values[None])[0][0]
        generated: Tensor = self.mlp(values)
        return generated


def network_in(tensors: dict[str, Tensor]) -> PromptNetwork:
    """The network that these tensors, by its own names, are of.

    Raises:
        KeyError, RuntimeError: if they are not all of one.
    """
    kind = "lstm" if "lstm.weight_hh_l0" in tensors else "mlp"
    first = tensors["lstm.weight_hh_l0" if kind == "lstm" else "mlp.0.weight"]
    mid_dim = first.shape[1] if kind == "lstm" else first.shape[0]
    network = PromptNetwork(tensors["embedding.weight"], kind, mid_dim)
    network.load_state_dict(tensors)
    return network
