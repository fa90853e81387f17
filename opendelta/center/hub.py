"""The Hugging Face Hub, or any server that speaks its protocol, through its own client."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from opendelta.center.contents import FILES, Push, RemoteFile, Version, digest_of
from opendelta.center.engine import Engine
from opendelta.center.names import DEFAULT_REVISION, without_password
from opendelta.exceptions import CenterError, UnreachableError
from opendelta.version import __version__

# Seconds that the server may take to say what it has; downloads have the client's own limits.
_PATIENCE = 10.0
_MOST_NAMES = 1000
_RACE = "somebody else pushed to it at the same time. Nothing was changed; push again"
_REASONS = {
    401: "the token is wrong, or there is none and the delta is private or does not exist",
    403: "the token does not allow it",
    404: "there is no such delta or revision, or it is private",
    409: _RACE,
    412: _RACE,
}
# Large files are moved by a library of its own, which tells in words alone what happened.
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
_XET_LOST = re.compile(r"error (?:sending request|decoding response body)")


class HubEngine(Engine):
    """One model repository for each delta; a push is one commit.

    Args:
        endpoint: of the server; None for ``HF_ENDPOINT``, else https://huggingface.co.
        token: of a user; None for the one that the client finds (``HF_TOKEN``, else that of
            ``hf auth login``). That one is for ``HF_ENDPOINT`` alone and is sent nowhere else.

    Raises:
        CenterError: if the endpoint is not the URL of a server.
    """

    has_users = True

    def __init__(self, endpoint: str | None = None, token: str | bool | None = None) -> None:
        self.url = (endpoint or constants.ENDPOINT).rstrip("/")
        if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+(/[^\s?#]*)?", self.url):
            raise CenterError(
                f"{without_password(self.url)!r:.120} is not the URL of a server: expected "
                "'https://a.server', with no user or password, for which there is `token`."
            )
        if token is None and self.url != constants.ENDPOINT.rstrip("/"):
            token = False
        self.api = HfApi(self.url, token, library_name="opendelta", library_version=__version__)

    def user(self) -> str:
        return str(self.api.whoami()["name"])

    def is_offline(self) -> bool:
        return super().is_offline() or constants.is_offline_mode()

    def look_up(self, name: str, revision: str) -> Version:
        if "/" not in name:
            raise CenterError(
                f"{name!r} is no name on {self.url}, where each delta belongs to somebody: "
                f"expected 'user/{name}'."
            )
        info = self.api.model_info(name, revision=revision, files_metadata=True, timeout=_PATIENCE)
        files = {
            file.rfilename: RemoteFile(
                file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id
            )
            for file in info.siblings or ()
            if file.rfilename in FILES and file.blob_id is not None
        }
        if info.sha is None:
            raise CenterError(f"{self.url} does not say which revision of {name} it has.")
        return Version(info.sha, files)

    def fetch(self, name: str, revision: str, file: str, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            came = self.api.hf_hub_download(name, file, revision=revision, local_dir=scratch)
            os.replace(came, target)

    def publish(self, push: Push) -> str:
        if not push.create_pr:  # which is for a repository that is there, perhaps another user's
            self.api.create_repo(push.name, private=push.private, exist_ok=True)
            if push.branch != DEFAULT_REVISION:
                self.api.create_branch(push.name, branch=push.branch, exist_ok=True)
        before = self.look_up(push.name, push.branch)
        if all(_is_held(path, before.files.get(file)) for file, path in push.files.items()):
            return before.revision
        # The client sends what differs from the version before. If that is another one by then, the
        # commit must fail: it would make one version of two.
        commit = self.api.create_commit(
            push.name,
            [CommitOperationAdd(file, path) for file, path in push.files.items()],
            commit_message=push.message,
            revision=push.branch,
            create_pr=push.create_pr,
            parent_commit=before.revision,
        )
        return commit.oid

    def names(self, search: str) -> Iterator[str]:
        for model in self.api.list_models(filter="opendelta", search=search, limit=_MOST_NAMES):
            yield model.id

    def explain(self, error: Exception) -> CenterError:
        causes = list(_causes(error))
        status = next(filter(None, map(_status, causes)), 0)
        if status == 404 and "xet-write-token" in str(error):
            return CenterError("the server does not speak Xet (404). Set HF_HUB_DISABLE_XET=1.")
        if status in _REASONS:
            return CenterError(f"{_REASONS[status]} ({status}).")
        if status == 429 or status >= 500 or any(map(_is_lost, causes)):
            code = f" ({status})" if status else ""
            return UnreachableError(f"no answer now{code}. {causes[-1]}")
        return super().explain(error)


def _is_held(file: Path, remote: RemoteFile | None) -> bool:
    return remote is not None and digest_of(file, remote) == remote.digest


def _status(error: BaseException) -> int:
    """The status of the answer that an error tells of; 0 if there was none."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    told = _XET_STATUS.search(str(error))
    return int(told[1]) if told else 0


def _is_lost(error: BaseException) -> bool:
    """Whether an error tells of a connection that was not made, or broke."""
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return True
    of_http = isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)
    return of_http or _XET_LOST.search(str(error)) is not None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
