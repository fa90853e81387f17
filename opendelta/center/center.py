"""DeltaCenter: where deltas are published and found (specification 1.6, 1.23.1)."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from opendelta.center.cache import Cache
from opendelta.center.contents import (
    CARD_FILE,
    TEXT_LIMIT,
    DeltaInfo,
    Push,
    Version,
    check_file,
    check_weights,
    expected_files,
    files_to_push,
)
from opendelta.center.engine import Engine
from opendelta.center.folder import FolderEngine
from opendelta.center.names import (
    DEFAULT_REVISION,
    check_name,
    check_revision,
    is_hash,
    without_password,
)
from opendelta.exceptions import CenterError, OpenDeltaError, UnreachableError
from opendelta.ground.files import CONFIG_FILE, read_config

logger = logging.getLogger(__name__)


class DeltaCenter:
    """A place to push deltas to and to pull them from.

    Its engine says how to look a version up, fetch one of its files, publish files and list names;
    what is checked, and in which order, is the same for all and stands here.

    Attributes:
        engine: the storage.
        url: of the center, without a password.

    Example:
        >>> center = DeltaCenter.from_url("file:///shared/deltas")
        >>> center.push("my_delta", "me/sentiment")
        >>> folder = center.pull("me/sentiment")
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.url = engine.url

    @classmethod
    def from_url(
        cls, url: str | DeltaCenter | None = None, token: str | bool | None = None
    ) -> DeltaCenter:
        """The center at `url`.

        Args:
            url: None for the environment variable ``DELTACENTER_URL``, else the Hugging Face Hub;
                ``file:///a/folder``; ``https://...``, a server that speaks the Hub's protocol
                (``hf://``: the Hub); any URL for which an fsspec driver is installed
                (``s3://bucket/prefix``). A `DeltaCenter` is returned as it is.
            token: for the Hub instead of the one that its client finds (``HF_TOKEN``).

        Raises:
            CenterError: if it is no URL of a center, or its driver is missing or refuses it.
            UnreachableError: if the driver cannot connect.
        """
        if isinstance(url, DeltaCenter):
            return url
        url = url or os.environ.get("DELTACENTER_URL") or "hf://"
        parts = re.fullmatch(r"([a-z][a-z0-9+.-]*)(?:::[^:]+)*://(.*)", url, re.DOTALL)
        scheme, place = parts.groups() if parts else ("", "")
        if bool(place) == (scheme == "hf"):  # the Hub is one place, and all others have a name
            raise CenterError(
                f"{without_password(url)!r:.120} is not the URL of a center: expected "
                "'file:///a/folder' (`Path('a folder').resolve().as_uri()`), 'hf://', "
                "'https://a.server' or 's3://bucket/prefix'."
            )
        if scheme == "file":
            return cls(FolderEngine(url))
        if scheme in ("hf", "http", "https"):
            from opendelta.center.hub import HubEngine

            return cls(HubEngine(url if place else None, token))
        from opendelta.center.bucket import BucketEngine

        return cls(BucketEngine(url))

    # --- what a center does -----------------------------------------------------------------

    def push(
        self,
        folder: str | os.PathLike[str],
        name: str,
        *,
        message: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Publish a delta that `save_finetuned` wrote.

        ``config.json``, the weights that it names and ``README.md`` are taken along; other files
        are not.

        Args:
            folder: the saved delta.
            name: ``user/name``.
            message: why, for centers that keep a history.
            private: whether only its owners see it, on centers that know owners.
            revision: the branch to push to; None for ``main``.
            create_pr: propose the change instead of making it (on the Hub).

        Returns:
            The revision, a hash; ``pull(name, revision)`` gives this version for good.

        Raises:
            CheckpointError: if the folder holds no whole delta.
            CenterError: if the name is refused, or the center does.
        """
        check_name(name)
        branch = check_revision(revision or DEFAULT_REVISION)
        if is_hash(branch):
            raise CenterError(f"{branch!r} is the hash of a version; push to a branch's name.")
        files = files_to_push(Path(folder))
        with self._online(f"push {name!r} to {self.url}"):
            message = message or f"Push {name.rpartition('/')[2]}"
            full_name = self.full_name(name)
            push = Push(files, full_name, branch, message, private, create_pr)
            pushed = self.engine.publish(push)
        logger.info("Pushed %s to %s as %s, revision %s.", folder, self.url, name, pushed)
        return pushed

    def pull(
        self,
        name: str,
        revision: str | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Path:
        """The folder of a delta, downloaded where the cache does not hold its current version.

        Args:
            name: ``user/name``.
            revision: a branch, a tag, or a hash; None for ``main``.
            cache_dir: where downloads are kept; None for `default_cache_dir`.
            force_download: download it again even if it is there.
            local_files_only: ask no center, take what was pulled last (so does
                ``DELTACENTER_OFFLINE=1``).

        Raises:
            CenterError: if there is no such delta, no access, or what came is not whole. The cache
                is as before then.
        """
        check_name(name)
        asked = check_revision(revision or DEFAULT_REVISION)
        cache = Cache(self.url, cache_dir)
        offline = local_files_only or self.engine.is_offline()
        doing = f"pull {name!r} from {self.url}"
        if is_hash(asked) and not force_download:
            known = cache.find(name, asked)
            if known is not None:
                return known
        try:
            with self._online(doing, offline):
                version = self.engine.look_up(name, asked)
        except UnreachableError as error:
            last = None if force_download and not offline else cache.last(name, asked)
            if last is None:
                raise
            logger.log(
                logging.INFO if offline else logging.WARNING,
                "%s Using revision %s of %s, the last one that was pulled.",
                error,
                last.name,
                name,
            )
            return last
        with self._online(doing):
            folder = None if force_download else cache.find(name, version.revision)
            if folder is None:
                folder = cache.put(
                    name, version.revision, lambda into: self._download(name, version, into)
                )
            cache.note(name, asked, version.revision)
        return folder

    def list(self, search: str = "") -> Sequence[str]:
        """Names of the deltas on this center, sorted.

        Args:
            search: only those whose name contains this.
        """
        with self._online(f"list {self.url}"):
            return sorted(self.engine.names(search))

    def info(self, name: str, revision: str | None = None) -> DeltaInfo:
        """What there is to know about a delta without downloading its weights.

        Raises:
            CenterError: if there is no such delta, or no access.
        """
        check_name(name)
        asked = check_revision(revision or DEFAULT_REVISION)
        with (
            self._online(f"look up {name!r} on {self.url}"),
            tempfile.TemporaryDirectory() as scratch,
        ):
            folder, version = Path(scratch), self.engine.look_up(name, asked)
            for file in (CONFIG_FILE, CARD_FILE):
                if file in version.files:
                    self._take(name, version, file, folder)
            sizes = {file: remote.size for file, remote in version.files.items()}
            return DeltaInfo.of(folder, sizes, name, version.revision, self.url)

    def full_name(self, name: str) -> str:
        """The name under which ``push(..., name)`` publishes.

        On the Hub, a name alone is in the namespace of the token's user.

        Raises:
            CenterError: if the token is not one.
        """
        if "/" in name or not self.engine.has_users:
            return name
        with self._online(f"see whose token this is on {self.url}"):
            return f"{self.engine.user()}/{name}"

    # --- in steps ---------------------------------------------------------------------------

    def _download(self, name: str, version: Version, into: Path) -> None:
        """Fetch the files of a version, each checked, and no others."""
        if CONFIG_FILE not in version.files:
            raise CenterError(f"{name} on {self.url} holds no {CONFIG_FILE}, so it is no delta.")
        self._take(name, version, CONFIG_FILE, into)
        config = read_config(into)
        for file in expected_files(config, version.files, f"{name} on {self.url}")[1:]:
            self._take(name, version, file, into)
        check_weights(config, into)

    def _take(self, name: str, version: Version, file: str, into: Path) -> None:
        remote = version.files[file]
        if file in (CONFIG_FILE, CARD_FILE) and remote.size > TEXT_LIMIT:
            raise CenterError(f"{file} of {name} has {remote.size} bytes; at most {TEXT_LIMIT}.")
        self.engine.fetch(name, version.revision, file, into / file)
        check_file(into / file, remote)

    @contextmanager
    def _online(self, doing: str, offline: bool | None = None) -> Iterator[None]:
        """Refuse while offline; tell an engine's error as one of ours, with the cause chained."""
        if self.engine.is_offline() if offline is None else offline:
            raise UnreachableError(
                f"Cannot {doing}: offline, as local_files_only or the environment asks."
            )
        try:
            yield
        except OpenDeltaError:
            raise
        except Exception as error:  # each engine has its own, and a broken answer causes any
            reason = self.engine.explain(error)
            raise type(reason)(f"Cannot {doing}: {reason}") from error
