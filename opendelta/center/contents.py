"""What a delta on a center consists of: three files of fixed names, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opendelta.exceptions import CenterError
from opendelta.ground.files import CONFIG_FILE, WEIGHT_FILES, read_config, sha256_of

CARD_FILE = "README.md"
# Names that are ever read from a center, whatever else lies there.
FILES = (CONFIG_FILE, *WEIGHT_FILES, CARD_FILE)
# Far above any real config or card; a center cannot fill the memory of who only looks.
TEXT_LIMIT = 4 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file on a center: its size in bytes, and its sha256 or (40 digits) git's sha1."""

    size: int
    digest: str


@dataclass(frozen=True)
class Version:
    """One version of a delta on a center, which never changes."""

    revision: str
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Push:
    """Files that are to become the newest version of a branch.

    Attributes:
        files: by name.
        name: the delta's.
        branch: which.
        message, private, create_pr: see `DeltaCenter.push`.
    """

    files: dict[str, Path]
    name: str
    branch: str
    message: str
    private: bool | None
    create_pr: bool


@dataclass(frozen=True)
class DeltaInfo:
    """What a center knows about a delta without its weights.

    Attributes:
        name: ``user/name``.
        revision: the hash of this version.
        url: of the center.
        config: what ``config.json`` holds.
        sizes: bytes of each file.
        card: the text of ``README.md``, empty where there is none.
    """

    name: str
    revision: str
    url: str
    config: dict[str, Any]
    sizes: dict[str, int]
    card: str

    @classmethod
    def of(
        cls, folder: Path, sizes: dict[str, int], name: str, revision: str = "", url: str = ""
    ) -> DeltaInfo:
        """What a folder with the config, and maybe the card, of a delta tells."""
        card = (folder / CARD_FILE).read_text("utf-8", "replace") if CARD_FILE in sizes else ""
        return cls(name, revision, url, read_config(folder), sizes, card)


def expected_files(config: dict[str, Any], present: Collection[str], where: str) -> list[str]:
    """The files to take along, the config first.

    Args:
        config: what ``config.json`` holds.
        present: names of the files that are there.
        where: for the error message.

    Raises:
        CenterError: if the config names weights that are not there, or something else than weights.
    """
    named = config.get("weights_file")
    if named is not None and named not in WEIGHT_FILES:
        raise CenterError(
            f"The {CONFIG_FILE} of {where} says that its weights are in {named!r:.80}; expected "
            f"{' or '.join(WEIGHT_FILES)}."
        )
    if named is not None and named not in present:
        raise CenterError(f"{where} lacks {named}, the weights that its {CONFIG_FILE} names.")
    weights = [name for name in WEIGHT_FILES if name in present and named in (None, name)]
    card = [CARD_FILE] if CARD_FILE in present else []
    return [CONFIG_FILE, *weights[:1], *card]


def files_to_push(folder: Path) -> dict[str, Path]:
    """The files of a saved delta, by name.

    Raises:
        CheckpointError: if the folder holds no delta.
        CenterError: if one of them is a link, or the weights are not those of the config.
    """
    config = read_config(folder)
    present = [name for name in FILES if (folder / name).exists() or (folder / name).is_symlink()]
    files = {name: folder / name for name in expected_files(config, present, str(folder))}
    for file in files.values():
        if file.is_symlink() or not file.is_file():
            raise CenterError(
                f"{file} is a link or no plain file: it could publish a file from elsewhere. Copy "
                "what it stands for into the folder."
            )
    check_weights(config, folder)
    return files


def check_file(file: Path, expected: RemoteFile) -> None:
    """Refuse a download that is not what the center said it has.

    Raises:
        CenterError: naming what differs.
    """
    size = file.stat().st_size
    if size != expected.size:
        raise CenterError(f"{file.name} came with {size} bytes instead of {expected.size}.")
    digest = digest_of(file, expected)
    if digest != expected.digest:
        raise CenterError(
            f"{file.name} was changed on its way: its hash is {digest[:12]}..., not "
            f"{expected.digest[:12]}..."
        )


def digest_of(file: Path, expected: RemoteFile) -> str:
    """The hash of a file, of the kind that the center has of it."""
    if len(expected.digest) == 64:
        return sha256_of(file)
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_weights(config: dict[str, Any], folder: Path) -> None:
    """Refuse weights that are not those whose sha256 the config holds.

    Raises:
        CenterError: if they are others.
    """
    named, expected = config.get("weights_file"), config.get("weights_sha256")
    if named and expected and sha256_of(folder / named) != expected:
        raise CenterError(
            f"{named} is damaged or not the file that was saved: its sha256 is not the one in its "
            f"{CONFIG_FILE} ({str(expected)[:12]}...)."
        )
