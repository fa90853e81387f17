"""The backbone and the data of these examples: tiny, so that they run anywhere in seconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

ROWS = 32


def backbone() -> Any:
    """A BERT with random weights, the same in every process."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96}
    return BertForSequenceClassification(BertConfig(num_attention_heads=4, vocab_size=200, **sizes))


def rows() -> list[dict[str, torch.Tensor]]:
    """Texts of eight tokens, those of one class with token 7 in them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 200, (ROWS, 8), generator=generator)
    labels = torch.arange(ROWS) % 2
    ids[labels == 1, ::2] = 7
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def batch(rank: int, world: int) -> dict[str, torch.Tensor]:
    """One rank's rows together."""
    mine = rows()[rank * ROWS // world : (rank + 1) * ROWS // world]
    return {key: torch.stack([row[key] for row in mine]) for key in mine[0]}
