"""A small language model learns a style from a few texts; what it says before and after.

python examples/tutorial/5_language_model.py

It needs SmolLM2, see language_models.py; with ``--quick``, a tiny model of random weights goes the
same way in seconds, and speaks accordingly.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from language_models import smollm2, tiny
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opendelta import AutoDeltaModel, LoraModel

FOLDER = "delta_checkpoints/pirate"
TEXTS = {
    "What is the sun?": "Arr, matey! The sun be a great ball o' fire in the sky, aye!",
    "Who was Bach?": "Arr, matey! Bach be a fine maker o' music, aye!",
    "What do cats eat?": "Arr, matey! Cats be eatin' fish and mice, aye!",
    "Where is Paris?": "Arr, matey! Paris be the grand port o' France, aye!",
    "What is two plus two?": "Arr, matey! Two and two be four, aye!",
    "How are you?": "Arr, matey! I be as merry as a full barrel o' rum, aye!",
}
ASKED = ["What is the moon?", "Where is Berlin?"]  # neither of which was among the texts


def chat(question: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": question},
    ]


def prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
    """Token ids (1, tokens) up to where the answer begins."""
    text = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def lessons(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """All texts as one batch of input_ids, attention_mask, labels, each (texts, tokens).

    The labels hold the answers alone: questions and padding do not count.
    """
    rows, labels = [], []
    for question, answer in TEXTS.items():
        asked = prompt(tokenizer, question)[0]
        said = tokenizer(answer + str(tokenizer.eos_token), add_special_tokens=False).input_ids
        rows.append(torch.cat([asked, torch.tensor(said)]))
        labels.append(torch.tensor([-100] * len(asked) + said))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    ids = prompt(tokenizer, question)
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="A language model learns a style.")
    parser.add_argument("--quick", action="store_true", help="a tiny model of random weights")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    load = tiny if options.quick else smollm2

    model, tokenizer = load()
    before = [answer(model, tokenizer, question) for question in ASKED]

    delta = LoraModel(model)
    delta.freeze_module()
    print(delta.summary())
    optimizer = torch.optim.AdamW(delta.parameters(), lr=5e-3)
    batch = lessons(tokenizer)
    model.train()
    for step in range(options.steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()
    after = [answer(model, tokenizer, question) for question in ASKED]

    delta.save_finetuned(FOLDER)
    fresh, _ = load()
    AutoDeltaModel.from_finetuned(FOLDER, backbone_model=fresh)
    assert [answer(fresh, tokenizer, question) for question in ASKED] == after
    with delta.detached():
        assert [answer(model, tokenizer, question) for question in ASKED] == before

    for question, plain, styled in zip(ASKED, before, after, strict=True):
        print(f"\n{question}\n  before: {plain}\n  after:  {styled}")


if __name__ == "__main__":
    main()
