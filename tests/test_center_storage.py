"""Centers wherever fsspec reaches, as in a store that speaks S3, and on an engine of ones own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from center_deltas import NAME, content, written

from opendelta import DeltaCenter
from opendelta.center.contents import Push, RemoteFile, Version
from opendelta.center.engine import Engine
from opendelta.exceptions import CenterError, CheckpointError, UnreachableError


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DELTACENTER_OFFLINE", raising=False)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An object store on loopback, in a process of its own; its URL."""
    log = tmp_path_factory.mktemp("s3") / "log"
    code = (
        "import sys; from moto.server import ThreadedMotoServer; from time import sleep\n"
        "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False); server.start()\n"
        "print(server.get_host_and_port()[1], flush=True)\n"
        "sleep(600)"
    )
    with log.open("wb") as errors:
        server = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    assert port, log.read_text()
    url = f"http://127.0.0.1:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/deltas", method="PUT"), timeout=10)
    yield url
    server.kill()
    server.wait()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://deltas/{uuid.uuid4().hex}"


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.engines)])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/deltas"
    bucket: str = request.getfixturevalue("bucket")
    return bucket


def test_versions_branches_and_names(url: str, tmp_path: Path) -> None:
    center = DeltaCenter.from_url(url)
    assert center.list() == []
    folders = [written(tmp_path / str(seed), seed, 100_000) for seed in range(3)]
    first, second = center.push(folders[0], NAME), center.push(folders[1], NAME)
    third = center.push(folders[2], NAME, revision="v3")
    for asked, seed in ((None, 1), (first, 0), (second, 1), (third, 2), ("v3", 2)):
        assert content(center.pull(NAME, asked)) == content(folders[seed])
    other = DeltaCenter.from_url(url)
    assert other.list() == [NAME]
    assert other.info(NAME).card == "# version 1\n"
    assert other.info(NAME).sizes["model.safetensors"] == 100_000
    for name, revision in (("alice/other", None), (NAME, "v9"), (NAME, "0" * 64)):
        with pytest.raises(CenterError) as caught:
            center.pull(name, revision)
        assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_the_same_version_everywhere(url: str, tmp_path: Path) -> None:
    """The layout is the folder's, so a bucket may be copied to a share and back."""
    folder = written(tmp_path / "1", 1, 1000)
    there = DeltaCenter.from_url((tmp_path / "share").as_uri())
    assert DeltaCenter.from_url(url).push(folder, NAME) == there.push(folder, NAME)


def test_many_push_and_pull_one_name(url: str, tmp_path: Path) -> None:
    center = DeltaCenter.from_url(url)
    folders = [written(tmp_path / str(seed), seed, 50_000) for seed in range(4)]
    whole = [content(folder) for folder in folders]
    center.push(folders[0], NAME)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(4):
                center.push(folders[seed], NAME)
                pulled = center.pull(NAME, cache_dir=tmp_path / "c", force_download=True)
                assert content(pulled) in whole
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and content(center.pull(NAME)) in whole


def test_a_store_that_fails(url: str, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    center: Any = DeltaCenter.from_url(url)
    revision = center.push(written(tmp_path / "1", 1, 1000), NAME)
    folder = center.pull(NAME)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise TimeoutError("the store does not answer")

    monkeypatch.setattr(center.engine.storage, "cat_file", fail)
    assert center.pull(NAME) == folder
    assert revision in caplog.text and "the store does not answer" in caplog.text
    with pytest.raises(UnreachableError) as caught:
        center.pull("alice/other")
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_a_driver_that_is_not_installed() -> None:
    with pytest.raises(CenterError, match="adlfs|abfs") as caught:
        DeltaCenter.from_url("abfs://user:secret@container/deltas")
    assert isinstance(caught.value.__cause__, ImportError)
    assert "secret" not in str(caught.value).partition(": ")[0]


@pytest.mark.engines
def test_nobody_listens(bucket: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    began = time.perf_counter()
    with pytest.raises(UnreachableError):
        DeltaCenter.from_url(bucket).pull(NAME)
    assert time.perf_counter() - began < 60
    s3fs.S3FileSystem.clear_instance_cache()


class Shelf(Engine):
    """A kind of storage that the library does not know: a dict."""

    url = "shelf://here"

    def __init__(self) -> None:
        self.versions: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}

    def look_up(self, name: str, revision: str) -> Version:
        revision = self.branches.get(f"{name}@{revision}", revision)
        files = {
            file: RemoteFile(len(data), hashlib.sha256(data).hexdigest())
            for file, data in self.versions[revision].items()
        }
        return Version(revision, files)

    def fetch(self, name: str, revision: str, file: str, target: Path) -> None:
        target.write_bytes(self.versions[revision][file])

    def publish(self, push: Push) -> str:
        files = {file: path.read_bytes() for file, path in push.files.items()}
        revision = hashlib.sha256(b"".join(files.values())).hexdigest()
        self.versions[revision], self.branches[f"{push.name}@{push.branch}"] = files, revision
        return revision

    def names(self, search: str) -> list[str]:
        return sorted({key.partition("@")[0] for key in self.branches if search in key})


def test_a_center_over_an_engine_of_ones_own(tmp_path: Path) -> None:
    engine = Shelf()
    center = DeltaCenter(engine)
    folder = written(tmp_path / "1", 1, 1000)
    revision = center.push(folder, NAME, revision="next")
    assert content(center.pull(NAME, "next")) == content(center.pull(NAME, revision))
    assert content(center.pull(NAME, revision)) == content(folder)
    assert center.list("senti") == [NAME] and center.info(NAME, "next").config["lora_r"] == 2
    assert center.full_name("sentiment") == "sentiment"
    with pytest.raises(CenterError, match=r"^Cannot pull 'alice/sentiment' .*: KeyError: 'main'"):
        center.pull(NAME)
    engine.versions[revision]["config.json"] = b"{}"
    with pytest.raises(CheckpointError, match="not the config of a delta"):
        center.pull(NAME, revision, force_download=True)
