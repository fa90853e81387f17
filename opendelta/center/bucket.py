"""A center wherever fsspec reaches, with the user's own driver: ``s3://bucket/prefix``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs

from opendelta.center.contents import TEXT_LIMIT
from opendelta.center.names import without_password
from opendelta.center.versions import VersionedEngine
from opendelta.exceptions import CenterError, UnreachableError


class BucketEngine(VersionedEngine):
    """Object stores write each object at once, which is what the layout asks of a storage.

    Args:
        url: with the scheme of an installed driver, which finds credentials in its own way.
    """

    def __init__(self, url: str) -> None:
        self.url = without_password(url).rstrip("/")
        try:
            self.storage, self.root = url_to_fs(url)
        except OSError as error:  # some drivers connect at once
            raise UnreachableError(f"Cannot reach {self.url}: {error}") from error
        except Exception as error:  # each has its own for a URL that it refuses
            raise CenterError(
                f"There is no center at {self.url}: {error}. A scheme needs its fsspec driver, as "
                "'s3://bucket/prefix' needs `pip install s3fs`; 'file:///a/folder', 'hf://' and "
                "'https://a.server' need none."
            ) from error

    def explain(self, error: Exception) -> CenterError:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            return super().explain(error)
        return UnreachableError(f"{type(error).__name__}: {error}")

    def _read(self, key: str) -> bytes:
        return self.storage.cat_file(f"{self.root}/{key}", end=TEXT_LIMIT)

    def _write(self, key: str, content: bytes) -> None:
        self._into_folder(key, lambda path: self.storage.pipe_file(path, content))

    def _copy_to(self, source: Path, key: str) -> None:
        self._into_folder(key, lambda path: self.storage.put_file(str(source), path))

    def _open(self, key: str) -> tuple[IO[bytes], int]:
        path = f"{self.root}/{key}"
        size = self.storage.size(path)
        return self.storage.open(path, "rb"), size

    def _into_folder(self, key: str, write: Callable[[str], Any]) -> None:
        """Write; where the storage has real folders, make them first."""
        path = f"{self.root}/{key}"
        try:
            write(path)
        except FileNotFoundError:
            self.storage.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(path)

    def _folders(self) -> Iterable[str]:
        self.storage.invalidate_cache()
        try:
            return [str(path).rsplit("/", 1)[-1] for path in self.storage.ls(self.root, False)]
        except FileNotFoundError:  # nothing was pushed yet
            return []
