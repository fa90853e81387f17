"""Every script of the examples runs: offline, from an empty folder, as a user would start it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from xml.etree import ElementTree

import plot
import pytest

import opendelta

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = {
    path.relative_to(EXAMPLES).as_posix(): path
    for path in sorted(EXAMPLES.rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
}
# What a quick run is told, and what it must say.
QUICK: dict[str, tuple[list[str], str]] = {
    "must_try.py": ([], r"(?s)The same output: True.*Removed for good: True.*'adapter'|Trainable"),
    "examples_prompt.py": ([], r"(?s)T5, split +│ yes +│ no (?!.*\bno\b)"),
    "tutorial/0_basic.py": ([], r"(?s)Accuracy after: 1\.00.*the same logits"),
    "tutorial/0_interactive.py": ([], r"modules=\['bert\.encoder\.layer\.1\.output\.dense'"),
    "tutorial/0_regex.py": ([], r"Did you mean 'attention\.self\.query'"),
    "tutorial/1_multitask_serving.py": ([], r"Where can I complain\? +complaint +question"),
    "tutorial/3_with_accelerate.py": ([], r"Accuracy after: 1\.00"),
    "tutorial/4_with_trainer.py": ([], r"(?s)Accuracy: 1\.00.*the same logits"),
    "tutorial/5_language_model.py": (["--quick"], r"(?s)before: .*after: "),
}
# These run in test_quickstart.py and tests/engines: they need several processes, or an engine.
ELSEWHERE = r"quickstart\.py|distributed/.*|tutorial/2_with_bmtrain\.py"


METHODS = {getattr(value, "delta_type", "") for value in vars(opendelta).values()} - {""}


def run(script: Path, arguments: list[str], folder: Path) -> str:
    """What a script prints; where it prints the link of a selection, a module is selected."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    errors = folder / "errors.txt"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if "/?token=" in line:
                select("bert.encoder.layer.1.output.dense", line.strip())
    assert process.returncode == 0, errors.read_text()
    return printed


def select(name: str, link: str) -> None:
    request = urllib.request.Request(
        link.replace("/?", "/submit?"),
        data=json.dumps({"names": [name]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).close()


@pytest.mark.parametrize("name", QUICK)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    arguments, expected = QUICK[name]
    printed = run(SCRIPTS[name], arguments, tmp_path)
    assert re.search(expected, printed), printed
    assert ": False" not in printed  # of what the tour says that it holds


@pytest.mark.parametrize(
    "task, without",
    [("text_classification", set()), ("seq2seq", set()), ("image_classification", {"soft_prompt"})],
)
def test_the_comparison_runs_every_config(task: str, without: set[str], tmp_path: Path) -> None:
    ways = sorted(path.stem for path in (EXAMPLES / task).glob("*.json"))
    arguments = [task, "--quick", "--results", "results.json", "--plot", "plot.svg"]
    run(SCRIPTS["run.py"], arguments, tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert sorted(row["method"].replace(" ", "_") for row in rows) == ways
    assert set(ways) >= METHODS - without
    everything = next(row for row in rows if row["method"] == "full fine tuning")
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert (row["percent"] == 100) == (row is everything)
        assert row["file_kB"] <= everything["file_kB"]
        assert row["memory_MB"] > 12e-6 * row["trainable_parameters"] - 0.1
    assert len(ElementTree.parse(tmp_path / "plot.svg").findall("{*}circle")) == len(rows)


def test_each_script_is_run_somewhere() -> None:
    rest = SCRIPTS.keys() - QUICK.keys() - {"run.py"}
    assert rest and all(re.fullmatch(ELSEWHERE, name) for name in rest), rest


def test_a_plot_shows_each_point_where_it_belongs() -> None:
    points = [plot.Point("a & b", 1000, 0.7), plot.Point("c", 100_000, 0.81)]
    drawn = ElementTree.fromstring(plot.scatter(points))
    circles = drawn.findall("{*}circle")
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles]
    labels = drawn.findall("{*}text")
    texts = {t.text: (float(t.attrib["x"]), float(t.attrib["y"])) for t in labels}
    assert dots[0][0] == texts["1,000"][0] and dots[1][0] == texts["100,000"][0]
    assert dots[0][1] == pytest.approx(texts["0.70"][1] - 4)
    assert texts["0.85"][1] - 4 < dots[1][1] < texts["0.80"][1] - 4
    assert {"a & b", "c"} <= texts.keys()
