"""Sentences from movie reviews, each rated by people from -4 (awful) to 4 (wonderful).

They come with the source distribution of the package vaderSentiment 2.5 (C. J. Hutto and E. E.
Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM
2014). `download` fetches it once into the cache folder; nothing of it is installed or unpacked.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

REQUIREMENT = "vaderSentiment==2.5"
ARCHIVE = "vaderSentiment-2.5.tar.gz"
SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"
INNER_ARCHIVE = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


class Review(NamedTuple):
    text: str
    positive: bool


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/opendelta``, by default ``~/.cache/opendelta``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opendelta"


def download(folder: Path | None = None) -> Path:
    """The path of the archive in `folder` (default: `cache_folder`), fetched if it is not there.

    Raises:
        RuntimeError: if pip cannot fetch it, or what it gets has another sha256.
    """
    folder = folder or cache_folder()
    target = folder / ARCHIVE
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Given a hash, pip compares it before it looks into the archive (whose setup.py it runs to
        # learn the name and version).
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
        options = ["--quiet", "--no-deps", "--no-binary", "vaderSentiment", "--require-hashes"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *options,
            "-r",
            str(wanted),
            "-d",
            scratch,
        ]
        if subprocess.run(command).returncode:
            raise RuntimeError(
                f"pip could not fetch {REQUIREMENT}; its own words are above. It needs a package "
                f"index once: afterwards the archive is read from {target}."
            )
        os.replace(Path(scratch) / ARCHIVE, target)
    return target


def read(archive: Path, sha256: str = SHA256) -> list[Review]:
    """The reviews that people rated clearly, by one point at least, in the order of the file.

    Raises:
        ValueError: if the archive's content has another sha256 than `sha256`.
    """
    content = archive.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{archive} has the sha256 {found}, expected {sha256}: it is damaged or another file. "
            "Delete it and run again to fetch it anew."
        )
    lines = _member(_member(content, INNER_ARCHIVE), REVIEWS).decode("latin-1").split("\n")
    rows = (line.rstrip("\r").split("\t") for line in lines if line)  # number, mean rating, text
    return [Review(text, float(mean) > 0) for _, mean, text in rows if abs(float(mean)) >= 1]


def split(
    reviews: list[Review], train: int = 1000, test: int = 600, seed: int = 0
) -> tuple[list[Review], list[Review]]:
    """`train` reviews to learn from and `test` others to measure on, drawn by `seed`."""
    drawn = random.Random(seed).sample(reviews, train + test)
    return drawn[:train], drawn[train:]


def _member(archive: bytes, name: str) -> bytes:
    """One file of a tar archive, read in memory: no path inside it is ever written to."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile(name)
        if member is None:
            raise ValueError(f"{name} is not a file in the archive.")
        return member.read()
