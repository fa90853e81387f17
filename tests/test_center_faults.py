"""The real client of the Hub through a proxy that cuts, delays and changes what comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from center_deltas import NAME, content, written
from fault_proxy import FaultProxy, in_front_of
from hub_client import hurry, set_apart
from hub_server import HubServer, serving
from huggingface_hub import close_session
from processes import on_a_full_disk

from opendelta.center import DeltaCenter
from opendelta.exceptions import CenterError

SIZE = 300_000


@pytest.fixture(autouse=True, params=[False, True], ids=["xet off", "xet on"])
def xet(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """How large files are moved: every test of this file is run in both ways."""
    set_apart(monkeypatch, tmp_path, request.param)
    return request.param


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serving(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def proxy(hub: HubServer) -> Iterator[FaultProxy]:
    with in_front_of(hub.server_address[1]) as proxy:
        yield proxy
    close_session()


@pytest.fixture
def whole(hub: HubServer, tmp_path: Path) -> dict[str, bytes]:
    """What the server holds; it gives it back by Xet if that was the way it came."""
    folder = written(tmp_path / "1", 1, SIZE)
    DeltaCenter.from_url(hub.url, "hf_alice").push(folder, NAME)
    return content(folder)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.mark.parametrize("after", [0, 10, 300, 1500, 2500, 30_000, SIZE // 2])
def test_a_connection_that_is_always_cut(
    after: int, proxy: FaultProxy, whole: dict[str, bytes], tmp_path: Path, no_waiting: None
) -> None:
    """Large files are taken up where they stopped; so the cut ones may arrive, but whole."""
    proxy.cut_after = after
    center = DeltaCenter.from_url(proxy.url)
    try:
        assert content(center.pull(NAME)) == whole
    except CenterError as error:
        assert error.__cause__ is not None
        assert content(tmp_path / "cache") == {}
    else:
        assert after > 2000  # what is looked up first does not fit into less
    close_session()
    proxy.cut_after = None
    assert content(center.pull(NAME)) == whole


def test_a_push_that_is_cut(
    proxy: FaultProxy, hub: HubServer, tmp_path: Path, no_waiting: None
) -> None:
    center = DeltaCenter.from_url(proxy.url, "hf_alice")
    first, second = (written(tmp_path / str(seed), seed, 1000) for seed in (1, 2))
    center.push(first, NAME)
    for after in (0, 100, 400):
        close_session()
        proxy.cut_after = after
        with pytest.raises(CenterError) as caught:
            center.push(second, NAME)
        assert caught.value.__cause__ is not None
        files = hub.repos[NAME].files(hub.repos[NAME].refs["main"])
        files.pop(".gitattributes")
        assert files in (content(first), content(second))
    close_session()
    proxy.cut_after = None
    center.push(second, NAME)
    assert content(center.pull(NAME)) == content(second)


def test_a_full_disk(hub: HubServer, whole: dict[str, bytes], tmp_path: Path) -> None:
    center = DeltaCenter.from_url(hub.url)
    on_a_full_disk(lambda: center.pull(NAME))
    assert content(tmp_path / "cache") == {}
    assert content(center.pull(NAME)) == whole


def test_a_slow_connection(proxy: FaultProxy, whole: dict[str, bytes]) -> None:
    proxy.delay = 0.02
    assert content(DeltaCenter.from_url(proxy.url).pull(NAME)) == whole


def test_an_answer_that_does_not_come(
    proxy: FaultProxy, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    center = DeltaCenter.from_url(proxy.url)
    folder = center.pull(NAME)
    proxy.delay = 5
    monkeypatch.setattr("opendelta.center.hub._PATIENCE", 0.3)
    began = time.perf_counter()
    assert center.pull(NAME) == folder  # the last one
    assert time.perf_counter() - began < 4


CHANGES: dict[str, tuple[str, Any]] = {
    "the config": ("config.json", lambda whole: (b'"lora_r": 2', b'"lora_r": 3')),
    "the card": ("README.md", lambda whole: (b"# version 1", b"# Version 1")),
    "the weights": (
        "model.safetensors",
        lambda whole: (whole["model.safetensors"][:40], whole["model.safetensors"][:39] + b"\0"),
    ),
    "the sha256 in the config": (
        "config.json",
        lambda whole: (b'"weights_sha256": "', b'"weights_sha255": "'),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_bytes_that_are_changed_on_the_way(
    case: str, proxy: FaultProxy, whole: dict[str, bytes], tmp_path: Path
) -> None:
    file, change = CHANGES[case]
    proxy.swap = change(whole)
    center = DeltaCenter.from_url(proxy.url)
    with pytest.raises(CenterError, match=rf"{file} was changed"):
        center.pull(NAME)
    assert proxy.swapped and content(tmp_path / "cache") == {}
    proxy.swap = None
    assert content(center.pull(NAME)) == whole
