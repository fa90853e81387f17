"""A center in a folder or on a network share: ``file:///shared/deltas``."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from opendelta.center.contents import TEXT_LIMIT
from opendelta.center.versions import VersionedEngine
from opendelta.exceptions import CenterError, UnreachableError
from opendelta.ground.files import copy_atomically, write_atomically


class FolderEngine(VersionedEngine):
    """Every file appears in one rename; the folder is made by the first push.

    Args:
        url: ``file:///`` and the absolute path of the folder.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise CenterError(
                f"{url!r} is not the URL of a folder on this machine; expected 'file:///a/folder'. "
                "A share of another machine is mounted first."
            )
        self.root = Path(url2pathname(parts.path)).absolute()
        self.url = self.root.as_uri()

    def explain(self, error: Exception) -> CenterError:
        if not self.root.is_dir():
            return UnreachableError(f"there is no folder {self.root}.")
        return super().explain(error)

    def _read(self, key: str) -> bytes:
        with self._open(key)[0] as stream:
            return stream.read(TEXT_LIMIT)

    def _write(self, key: str, content: bytes) -> None:
        write_atomically(self._path(key), content)

    def _copy_to(self, source: Path, key: str) -> None:
        copy_atomically(source, self._path(key))

    def _open(self, key: str) -> tuple[IO[bytes], int]:
        self._require_root()
        path = self._path(key)
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would wait for ever
            raise CenterError(f"{path} is no plain file.")
        stream = path.open("rb")
        return stream, os.fstat(stream.fileno()).st_size

    def _folders(self) -> Iterable[str]:
        self._require_root()
        return [path.name for path in self.root.iterdir() if (path / "refs").is_dir()]

    def _require_root(self) -> None:
        if not self.root.is_dir():  # as where a share is not mounted
            raise UnreachableError(f"There is no folder {self.root}.")

    def _path(self, key: str) -> Path:
        """The path of a key, which leads through no link out of the folder.

        Raises:
            CenterError: if it would.
        """
        path = self.root
        for part in key.split("/"):
            path = path / part
            if path.is_symlink():
                raise CenterError(f"{path} is a link, which a center does not follow.")
        return path
