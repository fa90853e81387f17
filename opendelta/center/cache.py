"""Deltas that were pulled, on this machine: whole versions, found by center, name and revision."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from opendelta.center.names import as_file_name, is_hash
from opendelta.ground.files import CONFIG_FILE, write_atomically

_DAY = 24 * 60 * 60.0


def default_cache_dir() -> Path:
    """``delta_center`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "delta_center"


def is_offline() -> bool:
    """Whether ``DELTACENTER_OFFLINE`` asks to do with what was pulled."""
    return os.environ.get("DELTACENTER_OFFLINE", "").lower() in ("1", "true", "yes", "on")


class Cache:
    """What was pulled from one center.

    A version appears in one rename, so that there is all of it or nothing, whoever was killed or
    pulled at the same time. ``<folder>/<name>/<revision>/`` holds it, and
    ``<folder>/<name>/refs/<branch>`` says which one the center had last.
    """

    def __init__(self, url: str, cache_dir: str | os.PathLike[str] | None = None) -> None:
        folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        scheme = url.partition(":")[0]
        self.folder = folder / f"{scheme}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"

    def find(self, name: str, revision: str) -> Path | None:
        """The folder of a version, if it is here."""
        folder = self._of(name) / revision
        return folder if is_hash(revision) and (folder / CONFIG_FILE).is_file() else None

    def last(self, name: str, asked: str) -> Path | None:
        """The version that a branch, tag or hash stood for when the center was last asked."""
        note = self._of(name) / "refs" / as_file_name(asked)
        return self.find(name, note.read_text().strip() if note.is_file() else asked)

    def note(self, name: str, asked: str, revision: str) -> None:
        """Remember which version a branch or tag stands for."""
        if not is_hash(asked):
            note = self._of(name) / "refs" / as_file_name(asked)
            write_atomically(note, revision.encode())

    def put(self, name: str, revision: str, fill: Callable[[Path], None]) -> Path:
        """Let `fill` write a version into a folder of its own, then put it in place."""
        target, incoming = self._of(name) / revision, self._of(name) / "incoming"
        incoming.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(incoming)
        staging = Path(tempfile.mkdtemp(dir=incoming))
        try:
            fill(staging)
            try:
                os.rename(staging, target)
            except OSError:
                if not target.is_dir():
                    raise
                for file in staging.iterdir():  # of the same version, so each may go in by itself
                    os.replace(file, target / file.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def _of(self, name: str) -> Path:
        return self.folder / as_file_name(name)


def _remove_leftovers(incoming: Path) -> None:
    """Remove what killed processes began to download more than a day ago."""
    for folder in incoming.iterdir():
        try:
            if time.time() - folder.stat().st_mtime > _DAY:
                shutil.rmtree(folder)
        except FileNotFoundError:  # another process was first
            continue
