"""Every Python block of the README and the docs runs: a file in one namespace, offline.

So does every example in a docstring, on a backbone that carries what the examples speak of.
"""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import opendelta

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OLD_PAGES = [ROOT / "tests" / "own_method_1_0.md"]  # what 1.0 told its users still runs


@pytest.mark.parametrize("page", PAGES + OLD_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__page__"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start(1)].count("\n")
        source = "\n" * line + match[1]  # so that a traceback shows the page's own lines
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_figures_are_written_into_their_place_on_a_page(tmp_path: Path) -> None:
    page, empty = tmp_path / "page.md", "<!-- table: bench -->\n<!-- end -->"
    page.write_text(f"Before.\n\n{empty}\n\nAfter.\n")
    fill = runpy.run_path(str(ROOT / "docs" / "tables.py"))["fill"]
    rows = [{"item": "step", "ours": 1.0346, "peft": None, "passed": True, "params": 1234}]
    for accuracy in (1.0346, 0.5):  # a second time in the place of the first
        rows[0]["ours"] = accuracy
        (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
        fill(page)
    expected = (
        "| item | OpenDelta | PEFT | passed | params |\n| --- | --- | --- | --- | --- |\n"
        "| step | 0.500 |  | yes | 1,234 |"
    )
    filled = f"<!-- table: bench -->\n\n{expected}\n\n<!-- end -->"
    assert page.read_text() == f"Before.\n\n{filled}\n\nAfter.\n"
    page.write_text("<!-- table: other -->\n<!-- end -->")
    with pytest.raises(FileNotFoundError, match="other.json"):
        fill(page)


def examples() -> Iterator[doctest.DocTest]:
    """The docstrings of the library that hold examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for found in pkgutil.walk_packages(opendelta.__path__, "opendelta."):
        if found.name != "opendelta.__main__":
            module = importlib.import_module(found.name)
            yield from (case for case in finder.find(module) if case.examples)


EXAMPLES = list(examples())


class Checker(doctest.OutputChecker):
    """Compares output only where an example states one: a call may log or print on the way."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def small() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=40, intermediate_size=24, **sizes)
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that examples use without defining them, in a folder with a saved delta."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, other = small(), small()
    delta_zh, delta_fr = opendelta.LoraModel(model), opendelta.AdapterModel(model)
    style, toxic = opendelta.LoraModel(other), opendelta.LoraModel(other)
    style.freeze_module()
    style.save_finetuned("my_delta")
    style.export_peft("peft_adapter")
    return {
        "model": model,
        "delta_zh": delta_zh,
        "delta_fr": delta_fr,
        "style": style,
        "toxic": toxic,
        "batch_of_four": {"input_ids": torch.arange(12).view(4, 3)},
    }


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_example_of_a_docstring_runs(
    example: doctest.DocTest, scene: dict[str, Any], tmp_path: Path
) -> None:
    for step in example.examples:
        step.source = step.source.replace("file:///shared", (tmp_path / "share").as_uri())
    public = {name: getattr(opendelta, name) for name in opendelta.__all__}
    example.globs = {**public, "opendelta": opendelta, "nn": torch.nn, **scene}
    told: list[str] = []
    runner = doctest.DocTestRunner(Checker(), verbose=False)
    runner.run(example, out=told.append)
    assert not runner.failures, "".join(told)


def test_docstrings_hold_examples() -> None:
    assert len(EXAMPLES) >= 8


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)", pages, re.MULTILINE))
    of_every_delta = {n for n in dir(opendelta.DeltaBase) if not n.startswith("_")}
    of_every_delta -= set(dir(torch.nn.Module))
    said = opendelta.DeltaBase.__doc__ or ""  # its class attributes among others
    of_every_delta -= set(re.findall(r"^ +(\w+): ", said, re.MULTILINE))
    public = {*opendelta.__all__, *(f"DeltaBase.{name}" for name in of_every_delta)}
    elsewhere = {"__version__", "BackboneMismatchWarning", "DeltaWarning", "OpenDeltaError"}
    assert not public - documented - elsewhere
