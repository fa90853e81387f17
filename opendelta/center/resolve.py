"""From what a user calls a delta to its folder: a local one, then the cache, then a center."""

from __future__ import annotations

import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from opendelta.center.cache import default_cache_dir, is_offline
from opendelta.center.center import DeltaCenter
from opendelta.center.contents import TEXT_LIMIT
from opendelta.exceptions import CenterError, UnreachableError
from opendelta.ground.files import CONFIG_FILE, delta_folder, resolve_folder, write_atomically

# Arguments of loading that say where a delta comes from, and how.
SOURCE_ARGUMENTS = frozenset(
    "center revision cache_dir force_download local_files_only token".split()
)


def resolve(
    path_or_name: str | os.PathLike[str],
    *,
    center: str | DeltaCenter | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The folder, or the config file, that a path, name or URL stands for.

    In this order: a local file or folder, of a Trainer's checkpoint the ``delta`` in it; the
    ``http(s)`` URL of a config file; the name of a delta on a center. The center is asked which
    version is the current one, and that comes from the cache if it is there. Offline, or where the
    center does not answer, the last one that was pulled is used, and the log says which.

    Args:
        path_or_name: a path, ``user/name``, or the URL of a config file.
        center, token: see `DeltaCenter.from_url`.
        revision, cache_dir, force_download, local_files_only: see `DeltaCenter.pull`.

    Raises:
        CheckpointError: if it is neither a path nor a name.
        CenterError: if a center refuses it, does not answer, or sends something damaged.
    """
    if os.path.isdir(path_or_name):
        return delta_folder(path_or_name)
    if os.path.exists(path_or_name):
        return Path(path_or_name)
    if not isinstance(path_or_name, str) or path_or_name.startswith((".", "/", "~")):
        return resolve_folder(path_or_name)
    if path_or_name.startswith(("http://", "https://")):
        return _config_at(path_or_name, cache_dir, local_files_only)
    try:
        return DeltaCenter.from_url(center, token).pull(
            path_or_name,
            revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    except CenterError as error:
        raise type(error)(f"There is no folder {path_or_name!r} here. {error}") from error


def source_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that `resolve` takes."""
    return {name: value for name, value in kwargs.items() if name in SOURCE_ARGUMENTS}


def _config_at(url: str, cache_dir: str | os.PathLike[str] | None, local_files_only: bool) -> Path:
    """The config file at a URL, kept in the cache."""
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    file = folder / "configs" / hashlib.sha256(url.encode()).hexdigest()[:16] / CONFIG_FILE
    if local_files_only or is_offline():
        if file.is_file():
            return file
        raise UnreachableError(f"{url} was not downloaded before, and now is offline.")
    try:
        with urlopen(url, timeout=10) as answer:
            content = answer.read(TEXT_LIMIT)
    except (OSError, ValueError, HTTPException) as error:
        raise CenterError(f"Cannot download the config at {url}: {error}") from error
    write_atomically(file, content)
    return file
