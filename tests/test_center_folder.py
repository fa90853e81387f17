"""The center in a folder, with real processes that push, pull and are killed."""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from center_deltas import NAME, content, written
from processes import FORK, in_processes, on_a_full_disk

from opendelta import DeltaCenter
from opendelta.exceptions import CenterError, CheckpointError, UnreachableError


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DELTACENTER_OFFLINE", raising=False)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    return tmp_path / "a share, of all"


@pytest.fixture
def center(share: Path) -> DeltaCenter:
    return DeltaCenter.from_url(share.as_uri())


def test_what_is_pushed_is_pulled(center: DeltaCenter, tmp_path: Path) -> None:
    folder = written(tmp_path / "1", 1)
    (folder / "optimizer.pt").write_bytes(b"not a part of it")
    revision = center.push(folder, NAME)
    pulled = center.pull(NAME)
    assert pulled.name == revision and tmp_path / "cache" in pulled.parents
    assert content(pulled) == {k: v for k, v in content(folder).items() if k != "optimizer.pt"}


def test_versions_branches_and_names(center: DeltaCenter, tmp_path: Path) -> None:
    folders = [written(tmp_path / str(seed), seed, 1000) for seed in range(4)]
    first, second = center.push(folders[0], NAME), center.push(folders[1], NAME)
    third = center.push(folders[2], NAME, revision="feature/x")
    center.push(folders[3], "team")
    for asked, seed in ((None, 1), (first, 0), (second, 1), (third, 2), ("feature/x", 2)):
        assert content(center.pull(NAME, asked)) == content(folders[seed])
    assert center.push(folders[0], NAME) == first  # named after the content
    assert content(center.pull(NAME)) == content(folders[0])
    assert center.list() == [NAME, "team"] and center.list("sent") == [NAME]
    info = center.info(NAME)
    assert (info.revision, info.config["lora_r"], info.card) == (first, 1, "# version 0\n")
    assert info.sizes["model.safetensors"] == 1000


def test_files_may_be_read_by_the_others(center: DeltaCenter, share: Path, tmp_path: Path) -> None:
    center.push(written(tmp_path / "1", 1, 1000), NAME)
    mask = os.umask(0)
    os.umask(mask)
    for path in (share, *share.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == wanted, path


def test_what_is_not_there(center: DeltaCenter, share: Path, tmp_path: Path) -> None:
    for call in (lambda: center.pull(NAME), lambda: center.info(NAME), center.list):
        with pytest.raises(UnreachableError, match="a share, of all"):
            call()
    center.push(written(tmp_path / "1", 1, 1000), NAME)
    for name, revision in (("alice/other", None), (NAME, "v2"), (NAME, "0" * 64)):
        with pytest.raises(CenterError, match=revision or "other") as caught:
            center.pull(name, revision)
        assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(CenterError, match="pull requests"):
        center.push(tmp_path / "1", NAME, create_pr=True)
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError):
            center.push(folder, NAME)


@pytest.mark.parametrize(("size", "shown"), [(2_000_000, True), (1000, False)])
def test_a_bar_on_a_terminal_for_what_takes_a_while(
    size: int, shown: bool, center: DeltaCenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    center.push(written(tmp_path / "1", 1, size), NAME)
    for terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", screen)
        center.pull(NAME, force_download=True)
        assert ("100%" in screen.getvalue()) == (terminal and shown)
        assert ("model.safetensors" in screen.getvalue()) == (terminal and shown)


# --- a share is not trusted -----------------------------------------------------------------------


def test_links_lead_nowhere(center: DeltaCenter, share: Path, tmp_path: Path) -> None:
    revision = center.push(written(tmp_path / "1", 1, 1000), NAME)
    whole, version = share / "alice--sentiment", f"versions/{revision}"
    for inner in ("", "refs", "refs/main", version, f"{version}/README.md"):
        place, aside = whole / inner, tmp_path / "aside"
        place.rename(aside)
        place.symlink_to(aside)
        with pytest.raises(CenterError, match="link"):
            center.pull(NAME, cache_dir=tmp_path / "other")
        if inner not in ("refs", "refs/main"):
            with pytest.raises(CenterError, match="link"):
                center.push(tmp_path / "1", NAME)
        place.unlink()
        aside.rename(place)
    assert content(center.pull(NAME)) == content(tmp_path / "1")


def test_a_link_is_not_pushed(center: DeltaCenter, tmp_path: Path) -> None:
    """It could publish a file that is nobody's business."""
    folder = written(tmp_path / "1", 1, 1000)
    (tmp_path / "secret").write_text("secret")
    for name in ("README.md", "config.json", "model.safetensors"):
        file = folder / name
        kept = file.read_bytes()
        file.unlink()
        file.symlink_to(tmp_path / ("secret" if name == "README.md" else "kept"))
        (tmp_path / "kept").write_bytes(kept)
        with pytest.raises(CenterError, match=rf"{name} is a link"):
            center.push(folder, NAME)
        file.unlink()
        file.write_bytes(kept)


def test_a_pipe_is_no_file(center: DeltaCenter, share: Path, tmp_path: Path) -> None:
    revision = center.push(written(tmp_path / "1", 1, 1000), NAME)
    file = share / "alice--sentiment" / "versions" / revision / "README.md"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CenterError, match="no plain file"):
        center.pull(NAME)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "longer"])
def test_damaged_versions(
    name: str, damage: str, center: DeltaCenter, share: Path, tmp_path: Path
) -> None:
    revision = center.push(written(tmp_path / "1", 1, 1000), NAME)
    file = share / "alice--sentiment" / "versions" / revision / name
    data = bytearray(file.read_bytes())
    flipped = data[:5] + bytes([data[5] ^ 1]) + data[6:]
    changed = {"cut": data[:-1], "flip": flipped, "empty": b"", "longer": data + b" "}
    file.unlink()
    if damage != "gone":
        file.write_bytes(changed[damage])
    with pytest.raises(CenterError):
        center.pull(NAME)
    assert content(tmp_path / "cache") == {}
    center.push(tmp_path / "1", NAME)  # mends it
    assert content(center.pull(NAME)) == content(tmp_path / "1")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"config.json": 1}', '{"config.json": {"size": "x"}}', "null", "[" * 9999]
)
def test_a_manifest_of_something_else(
    text: str, center: DeltaCenter, share: Path, tmp_path: Path
) -> None:
    """With the right hash, as only its author could give it."""
    import hashlib

    center.push(written(tmp_path / "1", 1, 1000), NAME)
    revision = hashlib.sha256(text.encode()).hexdigest()
    folder = share / "alice--sentiment" / "versions" / revision
    folder.mkdir()
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CenterError):
        center.pull(NAME, revision)


@pytest.mark.parametrize("text", ["", "main", "../../1", "0" * 64 + "/../x", "\0", "é"])
def test_a_reference_to_something_else(
    text: str, center: DeltaCenter, share: Path, tmp_path: Path
) -> None:
    center.push(written(tmp_path / "1", 1, 1000), NAME)
    (share / "alice--sentiment" / "refs" / "main").write_text(text)
    with pytest.raises(CenterError, match="damaged"):
        center.pull(NAME)


def test_weights_that_are_not_the_configs(center: DeltaCenter, tmp_path: Path) -> None:
    folder = written(tmp_path / "1", 1, 1000)
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(CenterError, match="sha256"):
        center.push(folder, NAME)


# --- processes ------------------------------------------------------------------------------------


def push_often(url: str, folder: Path, times: int) -> None:
    center = DeltaCenter.from_url(url)
    for _ in range(times):
        center.push(folder, NAME)


def pull_often(url: str, cache: Path, times: int, whole: list[dict[str, bytes]]) -> None:
    center = DeltaCenter.from_url(url)
    for _ in range(times):
        pulled = center.pull(NAME, cache_dir=cache, force_download=True)
        assert content(pulled) in whole
    assert content(center.pull(NAME, cache_dir=cache, local_files_only=True)) in whole


def test_twenty_processes_push_and_pull_one_name(
    center: DeltaCenter, share: Path, tmp_path: Path
) -> None:
    folders = [written(tmp_path / str(seed), seed, 200_000) for seed in range(10)]
    whole = [content(folder) for folder in folders]
    center.push(folders[0], NAME)
    url = share.as_uri()
    pushing = [(push_often, (url, folder, 6)) for folder in folders]
    pulling = [(pull_often, (url, tmp_path / f"cache {i % 3}", 6, whole)) for i in range(10)]
    in_processes([job for pair in zip(pushing, pulling, strict=True) for job in pair])
    assert content(center.pull(NAME)) in whole


def kill_soon(job: Callable[..., None], arguments: tuple[Any, ...], seconds: float) -> bool:
    """Whether the job was killed before it was done."""
    child = FORK.Process(target=job, args=arguments)
    child.start()
    time.sleep(seconds)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    return child.exitcode == -signal.SIGKILL


def killed_while_pushing(runs: int, tmp_path: Path, share: Path) -> None:
    center = DeltaCenter.from_url(share.as_uri())
    folders = [written(tmp_path / str(seed), seed) for seed in range(2)]
    whole = [content(folder) for folder in folders]
    began = time.perf_counter()
    center.push(folders[0], NAME)
    takes = time.perf_counter() - began
    chance, now, killed = random.Random(runs), 0, 0
    for run in range(runs):
        job = (share.as_uri(), folders[1 - now], 1)
        killed += kill_soon(push_often, job, chance.uniform(0, 2 * takes))
        pulled = content(center.pull(NAME, cache_dir=tmp_path / f"cache {run}"))
        assert pulled in whole
        now = whole.index(pulled)
    assert killed > runs // 4


def killed_while_pulling(runs: int, tmp_path: Path, share: Path) -> None:
    center = DeltaCenter.from_url(share.as_uri())
    whole = content(written(tmp_path / "1", 1))
    center.push(tmp_path / "1", NAME)
    began = time.perf_counter()
    center.pull(NAME, cache_dir=tmp_path / "first")
    takes = time.perf_counter() - began
    chance, killed = random.Random(runs), 0
    for run in range(runs):
        cache = tmp_path / f"cache {run}"
        job = (share.as_uri(), cache, 1, [whole])
        killed += kill_soon(pull_often, job, chance.uniform(0, 2 * takes))
        try:
            assert content(center.pull(NAME, cache_dir=cache, local_files_only=True)) == whole
        except UnreachableError:  # nothing of it is there
            assert content(center.pull(NAME, cache_dir=cache)) == whole
    assert killed > runs // 4


def test_killed_while_pushing(share: Path, tmp_path: Path) -> None:
    killed_while_pushing(15, tmp_path, share)


def test_killed_while_pulling(share: Path, tmp_path: Path) -> None:
    killed_while_pulling(15, tmp_path, share)


@pytest.mark.slow
def test_killed_two_hundred_times_while_pushing(share: Path, tmp_path: Path) -> None:
    killed_while_pushing(200, tmp_path, share)


@pytest.mark.slow
def test_killed_two_hundred_times_while_pulling(share: Path, tmp_path: Path) -> None:
    killed_while_pulling(200, tmp_path, share)


def test_a_full_disk(center: DeltaCenter, share: Path, tmp_path: Path) -> None:
    center.push(written(tmp_path / "1", 1, 1000), NAME)
    large = written(tmp_path / "2", 2)
    on_a_full_disk(lambda: center.push(large, NAME))
    assert content(center.pull(NAME)) == content(tmp_path / "1")
    center.push(large, NAME)
    on_a_full_disk(lambda: center.pull(NAME))
    last = center.pull(NAME, local_files_only=True)
    assert content(last) == content(tmp_path / "1")
    assert content(center.pull(NAME)) == content(large)
    assert list((tmp_path / "cache").rglob("incoming/*")) == []


def test_what_a_killed_process_left_goes_after_a_day(center: DeltaCenter, tmp_path: Path) -> None:
    center.push(written(tmp_path / "1", 1, 1000), NAME)
    incoming = center.pull(NAME).parent / "incoming"
    for name, age in (("old", 25), ("new", 23)):
        (incoming / name).mkdir()
        os.utime(incoming / name, (time.time() - age * 3600,) * 2)
    center.push(written(tmp_path / "2", 2, 1000), NAME)
    center.pull(NAME)
    assert [path.name for path in incoming.iterdir()] == ["new"]
