"""What the commands share: writing what others wrote, and where to write files."""

from __future__ import annotations

from pathlib import Path

from opendelta.exceptions import CheckpointError


def plain(text: object) -> str:
    """Text from elsewhere, without what could move a terminal's cursor or turn letters around."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def one_line(text: object) -> str:
    """Such text in one line."""
    return plain(" ".join(str(text).split()))


def require_new(target: Path) -> None:
    """Refuse to mix what is written with what is there.

    Raises:
        CheckpointError: if `target` exists and is not an empty folder.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; name one that does not.")
