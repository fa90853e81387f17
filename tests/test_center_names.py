"""Names, arguments and cards: what is decided before any center is asked."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from center_deltas import NAME, content, written
from hub_client import set_apart
from hub_server import serving
from hypothesis import given
from hypothesis import strategies as st

from opendelta import (
    DeltaCenter,
    DeltaCenterArguments,
    create_default_name,
    create_delta_center_args,
)
from opendelta.center.hub import HubEngine
from opendelta.center.names import as_file_name, as_name, check_name
from opendelta.exceptions import CenterError, ConfigError

GOOD = ["alice/sentiment", "bert_lora", "a/b", "A-1/x_y.z-2", "_a/_b", "a/" + "b" * 96, "1.5/2.0"]
BAD = [
    "", "/", "a/", "/a", "a//b", "a/b/c", ".", "..", "../a", "a/..", "a/../b", "..a/b", "a/b..c",
    "/etc/passwd", "//server/share", "C:/x", "C:x", "C:\\x", "\\\\server\\x", "a\\b", "~/x", "~",
    "a/.b", ".a/b", "a/b.", "-rf/x", "a/-b", "a/b-", "a--b/c", "a b/c", " a/b", "a/b ", "a/b\n",
    "a/b\0", "a\x1b/b", "a/b\u200b", "a/b\u202egpj", "\u0430/b", "\uff41/b", "a/b?x=1", "a/b#x",
    "a/b%2e%2e", "%2e%2e/b", "a@b/c", "user:pw@host/x", "http://x/y", "file:///etc", "s3://b/c",
    "a/b;c", "a/$HOME", "a/`id`", "a/*", "a/" + "b" * 97, "a" * 5000, None, 5, b"a/b", ["a", "b"],
]  # fmt: skip


@pytest.fixture
def center(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeltaCenter:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DELTACENTER_OFFLINE", raising=False)
    return DeltaCenter.from_url((tmp_path / "share").as_uri())


@pytest.mark.parametrize("name", GOOD)
def test_names(name: str, center: DeltaCenter, tmp_path: Path) -> None:
    folder = written(tmp_path / "delta", 1, 100)
    center.push(folder, name)
    assert content(center.pull(name)) == content(folder)
    assert center.list() == [name]


@pytest.mark.parametrize("name", BAD, ids=repr)
def test_what_is_no_name(name: Any, center: DeltaCenter, tmp_path: Path) -> None:
    folder = written(tmp_path / "delta", 1, 100)
    before = sorted(tmp_path.rglob("*"))
    for call in (lambda: center.push(folder, name), lambda: center.pull(name)):
        with pytest.raises(CenterError, match="not the name of a delta"):
            call()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("revision", ["../x", "a/../b", "/x", "x\n", "a b", "-x", "a--b", "x?y", 5])
def test_what_is_no_revision(revision: Any, center: DeltaCenter, tmp_path: Path) -> None:
    folder = written(tmp_path / "delta", 1, 100)
    center.push(folder, NAME)
    before = sorted(tmp_path.rglob("*"))
    for call in (
        lambda: center.push(folder, NAME, revision=revision),
        lambda: center.pull(NAME, revision),
        lambda: center.info(NAME, revision),
    ):
        with pytest.raises(CenterError, match="not a revision"):
            call()
    with pytest.raises(CenterError, match="hash of a version"):
        center.push(folder, NAME, revision="0" * 40)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(params=["folder", "bucket", "hub"])
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DeltaCenter]:
    set_apart(monkeypatch, tmp_path, xet=False)
    if request.param == "hub":
        with serving(tmp_path / "hub") as server:
            yield DeltaCenter.from_url(server.url, "hf_alice")
        return
    bucket = f"memory://{uuid.uuid4().hex}"
    yield DeltaCenter.from_url(bucket if request.param == "bucket" else (tmp_path / "s").as_uri())


def test_a_name_without_a_user(engine: DeltaCenter, tmp_path: Path) -> None:
    """It stands for itself; on the Hub, for the one of the user whose token it is."""
    folder = written(tmp_path / "delta", 1, 100)
    (folder / "README.md").write_text("---\ntags: [opendelta]\n---\n")
    engine.push(folder, "sentiment")
    on_hub = isinstance(engine.engine, HubEngine)
    full = "alice/sentiment" if on_hub else "sentiment"
    assert engine.list() == [full]
    assert content(engine.pull(full)) == content(folder) and engine.info(full).name == full
    if on_hub:
        for call in (engine.pull, engine.info):
            with pytest.raises(CenterError, match="belongs to somebody: expected 'user/sentiment'"):
                call("sentiment")


@given(st.text(max_size=20) | st.from_regex(r"[a.\-_/]{1,8}", fullmatch=True))
def test_a_name_stays_inside(name: str) -> None:
    """Whatever passes is one plain file name, and gives its name back."""
    try:
        check_name(name)
    except CenterError:
        return
    file = as_file_name(name)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", file) and ".." not in file
    assert as_name(file) == name


# --- URLs -----------------------------------------------------------------------------------------

NO_URLS = {
    "://": "file:///a/folder", "shared": "file:///a/folder", "/shared": "Path",
    "C:\\shared": "Path", "file:/x": "file:///a/folder", "file://": "file:///a/folder",
    "FILE:///x": "file:///a/folder", "s3://": "s3://bucket", "http://": "https://a.server",
    "hf://user/name": "'hf://'", "file://host/share": "file:///a/folder", "file:///a?b": "file:",
    "file:///a#b": "file:", "nope://x": "fsspec driver", "ftp:///x": "fsspec driver",
    "ftp://127.0.0.1:9/x": "127.0.0.1:9", "https://a b": "https://a.server",
    "https://a/b?c": "https://a.server", "https://me:secret@host": "token",
    "nope://me:secret@host/x": "nope://host/x", "me:secret@host": "a/folder",
}  # fmt: skip


@pytest.mark.parametrize("url", NO_URLS, ids=repr)
def test_urls_of_no_center(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused before anything is pushed or pulled, with a word of what is expected."""
    with pytest.raises(CenterError, match=re.escape(NO_URLS[url])) as caught:
        DeltaCenter.from_url(url)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("DELTACENTER_URL", url)
    with pytest.raises(CenterError, match=re.escape(NO_URLS[url])):
        DeltaCenter.from_url()


# --- arguments ------------------------------------------------------------------------------------


def test_center_args_beat_the_pool() -> None:
    pool = {"name": "b/b", "license": "mit", "learning_rate": 0.1, "train_tasks": "mnli"}
    args = create_delta_center_args({"name": "a/a", "train_tasks": ["sst2", "cola"]}, pool)
    assert args == DeltaCenterArguments(
        name="a/a", license="mit", train_tasks=["sst2", "cola"], train_datasets=[]
    )
    assert create_delta_center_args(DeltaCenterArguments(name="a/a"), pool).license == "mit"
    assert create_delta_center_args(None, pool).train_tasks == ["mnli"]
    assert create_delta_center_args({}, {}) == create_delta_center_args() == DeltaCenterArguments()


def test_arguments_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"'licence'.*'license'"):
        create_delta_center_args({"licence": "mit"})
    for wrong in (["name"], "name", 5):
        with pytest.raises(ConfigError, match=type(wrong).__name__):
            create_delta_center_args(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given_", "name"),
    [
        ({"backbone": "google-t5/t5-base", "delta_type": "lora"}, "t5-base_lora"),
        ({"a": "x", "b": "", "c": None, "d": ["p", "q"]}, "x_p-q"),
        ({"a": "/home/me/my model/"}, "my-model"),
        ({"a": "../..", "b": "x"}, "x"),
        ({"a": "a--b..c"}, "a-b.c"),
        ({"a": "x" * 200}, "x" * 96),
        ({}, "delta"),
        ({"a": "模型"}, "delta"),
        ({"lr": 0.1, "seed": 3}, "0.1_3"),
    ],
)
def test_the_default_name(given_: dict[str, Any], name: str) -> None:
    assert create_default_name(**given_) == name == check_name(name)


@given(st.dictionaries(st.sampled_from("abc"), st.text(max_size=12)))
def test_every_default_name_is_a_name(values: dict[str, str]) -> None:
    assert check_name(create_default_name(**values))
