"""A center on plain storage: versions that never change, and names that point to one of them.

    <user--name>/versions/<revision>/{config.json, model.safetensors, README.md, manifest.json}
    <user--name>/refs/main

The manifest holds size and sha256 of each file, and the revision is the sha256 of the manifest, so
that a version proves itself and pushing the same files twice changes nothing. A push writes the
reference last: until then the name stands for the version before, from then on for the new one,
whoever else pushes or pulls, and wherever a push is cut off.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from opendelta.center.contents import FILES, Push, RemoteFile, Version
from opendelta.center.engine import Engine
from opendelta.center.names import as_file_name, as_name, check_name, is_hash
from opendelta.exceptions import CenterError
from opendelta.ground.files import sha256_of

_MANIFEST = "manifest.json"
_WORTH_A_BAR = 1 << 20  # bytes


class VersionedEngine(Engine):
    """The layout; subclasses read and write keys (paths relative to the center)."""

    def look_up(self, name: str, revision: str) -> Version:
        if not is_hash(revision):
            revision = self._referred(name, revision)
        try:
            manifest = self._read(f"{_version(name, revision)}/{_MANIFEST}")
        except FileNotFoundError as error:
            raise CenterError(
                f"There is no revision {revision!r} of {name!r} on {self.url}."
            ) from error
        if hashlib.sha256(manifest).hexdigest() != revision:
            raise CenterError(f"Revision {revision} of {name} on {self.url} is damaged.")
        try:
            described = json.loads(manifest)
            files = {
                file: RemoteFile(int(described[file]["size"]), str(described[file]["digest"]))
                for file in FILES
                if file in described
            }
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CenterError(f"Revision {revision} of {name} is not one of a delta.") from error
        return Version(revision, files)

    def _referred(self, name: str, branch: str) -> str:
        try:
            revision = self._read(_reference(name, branch)).decode("ascii", "replace").strip()
        except FileNotFoundError as error:
            raise CenterError(f"There is no {name!r} with a {branch!r} on {self.url}.") from error
        if not is_hash(revision):
            raise CenterError(f"{name} on {self.url}: the reference {branch!r} is damaged.")
        return revision

    def fetch(self, name: str, revision: str, file: str, target: Path) -> None:
        from huggingface_hub.utils import tqdm

        stream, size = self._open(f"{_version(name, revision)}/{file}")
        hidden = True if size < _WORTH_A_BAR else None  # None: shown on a terminal only
        with (
            stream,
            target.open("wb") as copy,
            # The Hub client's own bar, so HF_HUB_DISABLE_PROGRESS_BARS=1 hides it too.
            tqdm.wrapattr(stream, "read", total=size, desc=file, disable=hidden) as reading,
        ):
            shutil.copyfileobj(reading, copy, 1 << 20)

    def publish(self, push: Push) -> str:
        if push.create_pr:
            raise CenterError(f"{self.url} knows no pull requests; push to another revision.")
        described = {
            file: {"size": path.stat().st_size, "digest": sha256_of(path)}
            for file, path in push.files.items()
        }
        manifest = json.dumps(described, indent=2, sort_keys=True).encode()
        revision = hashlib.sha256(manifest).hexdigest()
        for file, path in push.files.items():
            self._copy_to(path, f"{_version(push.name, revision)}/{file}")
        self._write(f"{_version(push.name, revision)}/{_MANIFEST}", manifest)
        self._write(_reference(push.name, push.branch), revision.encode())
        return revision

    def names(self, search: str) -> Iterator[str]:
        for folder in self._folders():
            try:
                name = check_name(as_name(folder))
            except CenterError:  # something else that lies there
                continue
            if search in name:
                yield name

    # --- storage ----------------------------------------------------------------------------

    @abstractmethod
    def _read(self, key: str) -> bytes:
        """A small file; FileNotFoundError where there is none."""

    @abstractmethod
    def _write(self, key: str, content: bytes) -> None:
        """Make a small file, or replace it, at once."""

    @abstractmethod
    def _copy_to(self, source: Path, key: str) -> None:
        """Copy a file there."""

    @abstractmethod
    def _open(self, key: str) -> tuple[IO[bytes], int]:
        """A file, opened for reading, and its size in bytes."""

    @abstractmethod
    def _folders(self) -> Iterable[str]:
        """Names of the folders at the top."""


def _version(name: str, revision: str) -> str:
    return f"{as_file_name(name)}/versions/{revision}"


def _reference(name: str, branch: str) -> str:
    return f"{as_file_name(name)}/refs/{as_file_name(branch)}"
