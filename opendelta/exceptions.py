"""What can go wrong, by kind. Every error of the library is an `OpenDeltaError`."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


class OpenDeltaError(Exception):
    """Base class of every error that the library raises on purpose."""


class AddressingError(OpenDeltaError, ValueError):
    """A pattern or common name addresses no module, or the wrong ones."""


class ConfigError(OpenDeltaError, ValueError):
    """An unknown method, an ill-typed hyper-parameter, a config that cannot be read."""


class UnknownArgumentError(ConfigError, TypeError):
    """An argument that a delta or its config does not have."""


class InsertionError(OpenDeltaError, ValueError):
    """A delta that cannot be put on the module it was asked to modify."""


class CheckpointError(OpenDeltaError, RuntimeError):
    """A delta's file that is missing, damaged, foreign, or does not fit the backbone."""


class CenterError(CheckpointError):
    """A delta that cannot be pushed to a DeltaCenter, or pulled from it."""


class UnreachableError(CenterError):
    """A DeltaCenter that does not answer now, or is not to be asked."""


class DeltaWarning(UserWarning):
    """Something that works, but probably not as meant."""


class UnmatchedPatternWarning(DeltaWarning):
    """A pattern given by the user matches nothing."""


class BackboneMismatchWarning(DeltaWarning):
    """A delta is loaded onto a backbone other than the one that it was trained on."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """The `count` choices that look most like `name`, ready for the end of an error message.

    Returns:
        ``" Did you mean 'a' or 'b'?"``, or the empty string where nothing comes near.
    """
    unique = list(dict.fromkeys(choices))
    close = difflib.get_close_matches(name, unique, n=count, cutoff=0.5)
    if not close:
        tail = name.rsplit(".", 1)[-1]
        close = [choice for choice in unique if tail and tail in choice][:count]
    return f" Did you mean {' or '.join(repr(choice) for choice in close)}?" if close else ""


def warn(message: str, category: type[DeltaWarning]) -> None:
    """Warn at the line of the user's that called into the library, however deep that was."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
