"""One backbone in memory, a delta for each task: one after the other, or all in one batch.

python examples/tutorial/1_multitask_serving.py
"""

from __future__ import annotations

import time

import torch
from sentences import (
    COMPLAINTS,
    PRAISE,
    QUESTIONS,
    STATEMENTS,
    accuracy,
    backbone,
    encoded,
    labelled,
)
from torch import nn

import opendelta
from opendelta import AdapterModel, DeltaBase, LoraModel

MOOD, FORM = ("complaint", "praise"), ("statement", "question")


def learn(model: nn.Module, delta: DeltaBase, no: list[str], yes: list[str]) -> None:
    """Train this delta alone; backbone and head stay as they are, so that tasks can share them."""
    delta.freeze_module(exclude=[delta])
    optimizer = torch.optim.AdamW(delta.parameters(), lr=5e-3)
    batch, labels = labelled(no, yes)
    model.train()
    for _ in range(12):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    print(f"{delta.delta_type} learned: accuracy {accuracy(model(**batch).logits, labels):.2f}")


def main() -> None:
    model = backbone()
    mood = LoraModel(model)
    learn(model, mood, COMPLAINTS, PRAISE)
    mood.detach()
    form = AdapterModel(model)  # another method for another task
    learn(model, form, STATEMENTS, QUESTIONS)
    form.detach()

    texts = ["Is this a good hotel?", "I loved it.", "Where can I complain?", "The food was awful."]
    batch = encoded(texts)
    with torch.no_grad():
        bare = model(**batch).logits

        # One task at a time. Switching moves no weights.
        began = time.perf_counter()
        with mood.attached():
            moods = model(**batch).logits
        with form.attached():
            forms = model(**batch).logits
        print(f"Two tasks, one after the other: {time.perf_counter() - began:.3f} s")
        for text, m, f in zip(texts, moods.argmax(-1), forms.argmax(-1), strict=True):
            print(f"  {text:24} {MOOD[m]:10} {FORM[f]}")

        # A batch in which each row has a task of its own, or none.
        with opendelta.route(model, [mood, form, None, mood]):
            mixed = model(**batch).logits
    expected = torch.stack([moods[0], forms[1], bare[2], moods[3]])
    assert torch.allclose(mixed, expected, atol=1e-4)
    assert torch.equal(model(**batch).logits, bare)
    print("Mixed in one batch: each row as with its own delta alone. Then the bare backbone again.")


if __name__ == "__main__":
    main()
