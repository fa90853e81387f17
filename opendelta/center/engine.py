"""What a `DeltaCenter` asks of the place that holds its deltas: five questions and two facts."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from opendelta.center.cache import is_offline
from opendelta.center.contents import Push, Version
from opendelta.exceptions import CenterError


class Engine(ABC):
    """A kind of storage. What is checked, and in which order, is `DeltaCenter`'s.

    Attributes:
        url: of the center, without a password.
        has_users: whether each delta belongs to a user; then names are ``user/name``.
    """

    url: str
    has_users: ClassVar[bool] = False

    @abstractmethod
    def look_up(self, name: str, revision: str) -> Version:
        """The version that a branch, tag or hash stands for now."""

    @abstractmethod
    def fetch(self, name: str, revision: str, file: str, target: Path) -> None:
        """Copy one file of a version to `target`."""

    @abstractmethod
    def publish(self, push: Push) -> str:
        """Make files the newest version of a branch, all at once; its hash."""

    @abstractmethod
    def names(self, search: str) -> Iterable[str]:
        """Names that contain `search`."""

    def user(self) -> str:
        """Who it is that pushes, where there are users."""
        raise NotImplementedError

    def is_offline(self) -> bool:
        """Whether the environment asks to leave this center alone."""
        return is_offline()

    def explain(self, error: Exception) -> CenterError:
        """One of our errors for a failure of the engine, as the reason why something cannot be."""
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        return CenterError(f"{'the disk is full. ' * full}{type(error).__name__}: {error}")
