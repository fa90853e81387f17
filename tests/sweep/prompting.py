"""A soft prompt made of real tokens, on every architecture, against those tokens before the text.

`judge(model_type)` says how far the outputs for the text are from those of the bare model that is
given the tokens themselves, relative to their size, or why that cannot be asked or was refused.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import tiny
import torch
from torch import Tensor, nn
from transformers import logging

from opendelta import OpenDeltaError, SoftPromptModel

TOKENS = (7, 11, 5)
COUNT = len(TOKENS)
WITHIN = 1e-3
ALONG = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0, "bbox": 0}


class Verdict(NamedTuple):
    """What was found on one architecture.

    Attributes:
        kind: "right", "wrong", "refused", "failed", or "not asked".
        off: the relative difference; `why`: what was said.
    """

    kind: str
    off: float = 0.0
    why: str = ""


def with_tokens(inputs: Mapping[str, Tensor], first: Tensor) -> dict[str, Any]:
    """The inputs with some tokens before the text, as long as that makes them."""
    ids = inputs["input_ids"]
    longer = {**inputs, "input_ids": torch.cat([first.expand(len(ids), -1), ids], 1)}
    for name, value in ALONG.items():
        old = inputs.get(name)
        if old is not None and old.shape[:2] == ids.shape:
            front = old.new_full((len(old), COUNT, *old.shape[2:]), value)
            longer[name] = torch.cat([front, old], 1)
    return longer


def to_the_text(module: nn.Module, args: Any, output: Any) -> Any:
    """What a prompted model inside another gives on: the states of the text."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cut, value))
        return value[:, COUNT:] if isinstance(value, Tensor) and value.dim() == 3 else value

    return type(output)(**{key: cut(value) for key, value in output.items()})


def as_soft_tokens(embedding: nn.Module, args: Any) -> Any:
    """Gemma 3n's further embeddings of ids give its own soft tokens the row of id 0."""
    ids = args[0]
    if ids.dim() != 2 or ids.shape[1] <= COUNT or ids[0, :COUNT].tolist() != list(TOKENS):
        return None
    return torch.cat([torch.zeros_like(ids[:, :COUNT]), ids[:, COUNT:]], 1), *args[1:]


def texts(output: Any, length: int) -> list[Tensor]:
    """The outputs that belong to the text's positions, and those that belong to none."""
    found = []
    for value in output.values() if isinstance(output, Mapping) else [output]:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value[:, -length:] if value.dim() == 3 else value)
    return found


def judge(model_type: str) -> Verdict:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = tiny.backbone(model_type).eval()
            inputs = tiny.batch(model)
        except Exception as error:  # of a config, or a package that is not there
            return Verdict("not asked", why=f"does not run: {type(error).__name__}")
        if "input_ids" not in inputs:
            return Verdict("not asked", why="takes no ids")
        try:
            return compared(model, inputs)
        except Exception as error:  # nothing may fail but what is told above
            return Verdict("failed", why=f"{type(error).__name__}: {error}")


def compared(model: nn.Module, inputs: Mapping[str, Tensor]) -> Verdict:
    first = torch.tensor([TOKENS])
    length = inputs["input_ids"].shape[1]
    fields = vars(model.config) if hasattr(model, "config") else {}
    again: Any = texts(model(**inputs), length)
    if not all(map(torch.equal, again, texts(model(**inputs), length))):
        return Verdict("not asked", why="is not deterministic")
    try:
        expand = {k: v for k, v in ALONG.items() if k in inputs or k != "bbox"}
        delta = SoftPromptModel(model, COUNT, other_expand_ids=expand)
    except OpenDeltaError as error:
        return Verdict("refused", why=str(error))
    (prompt,) = delta.parameters()
    home = next(i.module for i in delta.insertions if hasattr(i.module, "standing_in"))
    host = next(i.host for i in delta.insertions if i.module is home)
    with delta.detached():
        prompt.copy_(host(first)[0])
        cut = next(
            i for i in delta.insertions if i.module is not None and hasattr(i.module, "cuts")
        )
        handles = [cut.host.register_forward_hook(to_the_text)] if cut.module.cuts else []
        further = (m for n, m in model.named_modules() if n.endswith("embed_tokens_per_layer"))
        handles += [m.register_forward_pre_hook(as_soft_tokens) for m in further]
        try:
            expected = texts(model(**with_tokens(inputs, first)), length)
        except Exception as error:  # the model's, to which no more tokens can be given
            said = f"{type(error).__name__}: {error}"
            return Verdict("not asked", why=f"takes no more tokens: {said:.120}")
        for handle in handles:
            handle.remove()
    try:
        actual = texts(model(**inputs), length)
    except OpenDeltaError as error:
        return Verdict("refused", why=str(error))
    except Exception as error:  # nothing but ours may fail
        return Verdict("failed", why=f"{type(error).__name__}: {error}")
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return Verdict("wrong", 1.0, "other shapes")
    off = max(
        (
            float((a - e).abs().max() / e.abs().max().clamp(min=1e-9))
            for a, e in zip(actual, expected, strict=True)
            if e.numel()
        ),
        default=0.0,
    )
    return Verdict("right" if off <= WITHIN else "wrong", off, str(fields.get("model_type", "")))


def sweep(model_types: list[str], processes: int = 2) -> dict[str, Verdict]:
    """The verdict on each architecture."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(model_types, pool.map(judge, model_types), strict=True))


def main() -> None:
    found = sweep(sys.argv[1:] or tiny.model_types())
    for kind, group in itertools.groupby(
        sorted(found.items(), key=lambda i: i[1].kind), lambda i: i[1].kind
    ):
        members = list(group)
        print(f"{kind}: {len(members)}")
        if kind != "right":
            for name, verdict in members:
                print(f"  {name}: {verdict.off:.3f} {verdict.why:.160}")


if __name__ == "__main__":
    main()
