"""Names of deltas and revisions, checked before they become a path or part of a URL.

A delta's name is ``user/name``. In a folder or bucket, ``name`` alone is one too. On the Hub, where
each delta belongs to somebody, ``name`` alone can be pushed: under the user of the token.
"""

from __future__ import annotations

import re

from opendelta.exceptions import CenterError

DEFAULT_REVISION = "main"
# What the Hub allows too: no dot or dash at either end, so no hidden file, no option, no "..".
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def check_name(name: str) -> str:
    """`name`, if it is ``user/name`` or ``name``.

    Raises:
        CenterError: for anything else, saying what is allowed.
    """
    if not _parts_are_plain(name, at_most=2):
        raise CenterError(
            f"{name!r:.120} is not the name of a delta. A name is 'user/name': ASCII letters, "
            "digits, '-', '_' and dots, up to 96 of them on each side, with no '-' or '.' at an "
            "end, no '--' and no '..'."
        )
    return name


def check_revision(revision: str) -> str:
    """`revision`, if it is one: a branch or tag (``main``, ``refs/pr/1``) or a hash.

    Raises:
        CenterError: for anything else.
    """
    if not _parts_are_plain(revision, at_most=5):
        raise CenterError(
            f"{revision!r:.120} is not a revision: expected a name such as 'main' or 'v1.0', or "
            "the hash that push returned."
        )
    return revision


def is_hash(revision: str) -> bool:
    """Whether a revision names one version for good, as branches do not."""
    return _HASH.fullmatch(revision) is not None


def without_password(url: str) -> str:
    """A URL that may be shown."""
    return re.sub(r"(^|://)[^/@]*@", r"\1", url)


def as_file_name(name: str) -> str:
    """A checked name or revision as one file name; no two of them share it."""
    return name.replace("/", "--")


def as_name(file_name: str) -> str:
    """The name that `as_file_name` was given."""
    return file_name.replace("--", "/")


def _parts_are_plain(text: object, at_most: int) -> bool:
    if not isinstance(text, str) or ".." in text or "--" in text:
        return False
    parts = text.split("/")
    return len(parts) <= at_most and all(_PART.fullmatch(part) for part in parts)
