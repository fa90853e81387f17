"""The real client of the Hub against a server on loopback, and, with a token, the live Hub."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from center_deltas import NAME, content, saved, written
from hub_client import hurry, set_apart
from hub_server import HubServer, serving
from huggingface_hub import HfApi, close_session, constants
from processes import FORK, in_processes

from opendelta import AutoDeltaModel, DeltaCenter, OpenDeltaError
from opendelta.exceptions import CenterError, UnreachableError

LIVE_TOKEN = os.environ.get("OPENDELTA_TEST_HF_TOKEN")


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
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture
def alice(hub: HubServer) -> DeltaCenter:
    return DeltaCenter.from_url(hub.url, "hf_alice")


@pytest.fixture(params=["loopback", *(["live"] if LIVE_TOKEN else [])])
def anywhere(request: pytest.FixtureRequest) -> Iterator[tuple[DeltaCenter, str]]:
    """A center that may be written to, and a fresh name on it."""
    name = f"opendelta-test-{uuid.uuid4().hex[:8]}"
    if request.param == "loopback":
        server = request.getfixturevalue("hub")
        yield DeltaCenter.from_url(server.url, "hf_alice"), f"alice/{name}"
        return
    api = HfApi("https://huggingface.co", LIVE_TOKEN)
    name = f"{api.whoami()['name']}/{name}"
    try:
        yield DeltaCenter.from_url("https://huggingface.co", LIVE_TOKEN), name
    finally:
        api.delete_repo(name, missing_ok=True)


# --- pushing and pulling --------------------------------------------------------------------------


def test_what_is_pushed_is_pulled(anywhere: tuple[DeltaCenter, str], tmp_path: Path) -> None:
    center, name = anywhere
    delta = saved(tmp_path / "delta")
    (tmp_path / "delta" / "README.md").write_text("---\nlibrary_name: opendelta\n---\n# mine\n")
    (tmp_path / "delta" / "private notes.txt").write_text("not for others")
    revision = center.push(tmp_path / "delta", name, private=True)
    folder = center.pull(name)
    assert folder.name == revision and len(revision) == 40
    pushed = content(tmp_path / "delta")
    del pushed["private notes.txt"]
    assert content(folder) == pushed
    again = AutoDeltaModel.from_finetuned(folder, backbones.build("mlp"))
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), delta.parameters(), strict=True)
    )
    assert name in center.list(name.partition("/")[2])
    info = center.info(name)
    assert info.config["delta_type"] == "lora" and info.revision == revision
    assert info.sizes == {file: len(data) for file, data in pushed.items()}


def test_every_version_can_be_pulled(anywhere: tuple[DeltaCenter, str], tmp_path: Path) -> None:
    center, name = anywhere
    folders = [written(tmp_path / str(seed), seed, 1000) for seed in (1, 2, 3)]
    first, second = (center.push(folder, name, private=True) for folder in folders[:2])
    third = center.push(folders[2], name, revision="v3")
    assert len({first, second, third}) == 3
    for asked, seed in ((None, 2), ("main", 2), (first, 1), (second, 2), (third, 3), ("v3", 3)):
        assert content(center.pull(name, asked)) == content(tmp_path / str(seed))


def test_large_files_go_the_way_that_is_set(
    xet: bool, alice: DeltaCenter, hub: HubServer, tmp_path: Path
) -> None:
    alice.push(written(tmp_path / "1", 1, 1000), NAME)
    alice.pull(NAME)
    asked = [f"{method} {path}" for method, path in hub.requests]
    ways = {
        False: ("PUT /lfs/", "GET /lfs/"),
        True: ("POST /v1/xorbs", "POST /v1/shards", "GET /v1/reconstructions", "GET /xorbs/"),
    }
    for way, requests in ways.items():
        for request in requests:
            assert any(one.startswith(request) for one in asked) == (way == xet), request


def test_what_came_one_way_goes_the_other(
    xet: bool, alice: DeltaCenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice.push(written(tmp_path / "1", 1, 200_000), NAME)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", xet)
    assert content(alice.pull(NAME)) == content(tmp_path / "1")


WEIGHTS = {
    "many chunks": random.Random(0).randbytes(1_000_000),
    "zeros": bytes(300_000),
    "repetitive": b"low rank, low cost. " * 20_000,
    "numbers": b"".join(struct.pack("<f", i / 7) for i in range(50_000)),
    "one byte": b"x",
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_every_kind(case: str, alice: DeltaCenter, tmp_path: Path) -> None:
    """Xet packs them, and cuts them where it likes."""
    folder = written(tmp_path / "1", 1, weights=WEIGHTS[case])
    alice.push(folder, NAME)
    assert content(alice.pull(NAME)) == content(folder)
    longer = written(tmp_path / "2", 2, weights=WEIGHTS[case] + b"and more")
    alice.push(longer, NAME)
    assert content(alice.pull(NAME)) == content(longer)


def test_a_server_without_xet(
    xet: bool, alice: DeltaCenter, hub: HubServer, tmp_path: Path
) -> None:
    folder = written(tmp_path / "1", 1, 1000)
    hub.failing = [("xet-", 404)]
    if xet:
        with pytest.raises(CenterError, match="HF_HUB_DISABLE_XET=1"):
            alice.push(folder, NAME)
    hub.hold(NAME, content(folder))
    assert content(alice.pull(NAME)) == content(folder)


def test_pushing_the_same_again_makes_no_new_version(
    alice: DeltaCenter, hub: HubServer, tmp_path: Path
) -> None:
    folder = written(tmp_path / "delta", 1, 1000)
    first = alice.push(folder, NAME)
    assert alice.push(folder, NAME) == first


def test_a_pull_request_leaves_the_branch_alone(hub: HubServer, tmp_path: Path) -> None:
    alice, bob = DeltaCenter.from_url(hub.url, "hf_alice"), DeltaCenter.from_url(hub.url, "hf_bob")
    alice.push(written(tmp_path / "1", 1, 1000), NAME)
    with pytest.raises(CenterError, match="403"):
        bob.push(written(tmp_path / "2", 2, 1000), NAME)
    proposed = bob.push(tmp_path / "2", NAME, create_pr=True)
    assert content(alice.pull(NAME)) == content(tmp_path / "1")
    for revision in (proposed, "refs/pr/1"):
        assert content(alice.pull(NAME, revision)) == content(tmp_path / "2")


def test_saved_and_loaded_without_a_name(alice: DeltaCenter, tmp_path: Path) -> None:
    delta = saved(tmp_path / "delta")
    delta.save_finetuned(tmp_path / "delta", push_to_dc=True, center=alice)
    [name] = alice.list()
    assert name == f"alice/{type(delta.backbone_model).__name__}_lora"
    assert f'from_finetuned("{name}"' in alice.info(name).card
    again = AutoDeltaModel.from_finetuned(name, backbones.build("mlp"), center=alice)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), delta.parameters(), strict=True)
    )


def test_the_list_holds_what_the_card_calls_a_delta(
    alice: DeltaCenter, hub: HubServer, tmp_path: Path
) -> None:
    folder = written(tmp_path / "1", 1, 1000)
    for card, name in (("tags: [opendelta]", NAME), ("tags: [peft]", "alice/other")):
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
        alice.push(folder, name, private=True)
    assert alice.list() == [NAME] and alice.list("other") == []
    assert DeltaCenter.from_url(hub.url, "hf_bob").list() == []


def test_a_delta_of_0_3_2(hub: HubServer) -> None:
    """Its config names no weights file and has no sha256."""
    old = Path(__file__).parent / "golden" / "checkpoints"
    folder = next(file.parent for file in sorted(old.rglob("pytorch_model.bin")))
    files = {**content(folder), "training_args.bin": b"a pickle", "code.py": b"import os"}
    hub.hold("thunlp/old", files)
    pulled = content(DeltaCenter.from_url(hub.url).pull("thunlp/old"))
    assert set(pulled) == {"config.json", "pytorch_model.bin"}
    assert all(pulled[name] == files[name] for name in pulled)


def test_pulling_asks_for_what_changed_only(
    alice: DeltaCenter, hub: HubServer, tmp_path: Path
) -> None:
    revision = alice.push(written(tmp_path / "1", 1, 1000), NAME)
    alice.pull(NAME)
    hub.requests.clear()
    alice.pull(NAME)
    assert hub.requests == [("GET", f"/api/models/{NAME}/revision/main")]
    hub.requests.clear()
    alice.pull(NAME, revision)
    assert hub.requests == []
    alice.pull(NAME, revision, force_download=True)
    assert any(path.startswith(("/lfs/", "/xorbs/")) for _, path in hub.requests)


# --- the environment ------------------------------------------------------------------------------

SCRIPT = """
import sys
from opendelta import DeltaCenter
center = DeltaCenter.from_url()
print(center.push(sys.argv[1], "sentiment", private=True), center.pull("alice/sentiment"))
"""


def test_the_clients_own_settings(xet: bool, hub: HubServer, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN, in a process of their own, where the client reads them."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": str(int(not xet))}
    env |= {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(written(tmp_path / "1", 1, 1000))],
        env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    revision, folder = done.stdout.split()
    assert Path(folder).name == revision and hub.repos["alice/sentiment"].private


def test_the_users_token_goes_to_its_own_hub_alone(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    hub.hold(NAME, content(written(tmp_path / "1", 1, 1000)), private=True)
    with pytest.raises(CenterError, match="401"):
        DeltaCenter.from_url(hub.url).pull(NAME)
    assert DeltaCenter.from_url(hub.url, token="hf_alice").pull(NAME).is_dir()


def test_the_clients_offline_mode(
    alice: DeltaCenter, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice.push(written(tmp_path / "1", 1, 1000), NAME)
    folder = alice.pull(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert alice.pull(NAME) == folder
    with pytest.raises(UnreachableError, match="offline"):
        alice.push(folder, NAME)
    assert hub.requests == []


# --- what is not there, or not allowed ------------------------------------------------------------

TOKENS = {
    "no token, private": (False, True, NAME, "401"),
    "no token, missing": (False, False, "alice/nothing", "401"),
    "a wrong token": ("hf_wrong", False, NAME, "401"),
    "another's private one": ("hf_bob", True, NAME, "404"),
    "missing": ("hf_alice", False, "alice/nothing", "404"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_pulling_without_the_right(case: str, hub: HubServer, tmp_path: Path) -> None:
    token, private, name, status = TOKENS[case]
    hub.hold(NAME, content(written(tmp_path / "1", 1, 1000)), private=private)
    center = DeltaCenter.from_url(hub.url, token)
    for call in (center.pull, center.info):
        with pytest.raises(CenterError, match=status) as caught:
            call(name)
        assert caught.value.__cause__ is not None
        assert not isinstance(caught.value, UnreachableError)
    assert not (tmp_path / "cache").exists() or content(tmp_path / "cache") == {}


@pytest.mark.parametrize(
    ("token", "status"),
    [(False, "401"), ("hf_wrong", "401"), ("hf_reader", "403"), ("hf_bob", "403")],
)
def test_pushing_without_the_right(token: Any, status: str, hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(CenterError, match=status):
        DeltaCenter.from_url(hub.url, token).push(written(tmp_path / "1", 1, 1000), NAME)
    assert NAME not in hub.repos


def test_refused_anywhere(anywhere: tuple[DeltaCenter, str], tmp_path: Path) -> None:
    center, name = anywhere
    center.push(written(tmp_path / "1", 1, 1000), name, private=True)
    stranger, mistaken = (
        DeltaCenter.from_url(center.url, False),
        DeltaCenter.from_url(center.url, "hf_wrong"),
    )
    for call, status in (
        (lambda: stranger.pull(name), "401"),
        (lambda: mistaken.pull(name), "401"),
        (lambda: mistaken.push(tmp_path / "1", name), "401"),
        (lambda: center.pull(f"{name}-nothing"), "404"),
        (lambda: center.pull(name, "v9"), "404"),
        (lambda: center.info(name, "0" * 40), "404"),
    ):
        with pytest.raises(CenterError, match=status) as caught:
            call()
        assert caught.value.__cause__ is not None


TO_PUSH = ("repos/create", "revision/main", "preupload")
TO_PULL = ("api/models", "HEAD .*config.json", "GET .*config.json")
TO_PUSH_WEIGHTS = {
    False: ("lfs/objects/batch", "PUT /lfs"),
    True: ("xet-write-token", "POST /v1/xorbs", "POST /v./shards"),
}
TO_PULL_WEIGHTS = {
    False: ("GET /lfs",),
    True: ("xet-read-token", "/v./reconstructions", "GET /xorbs"),
}


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_refused_midway(
    status: int, xet: bool, alice: DeltaCenter, hub: HubServer, tmp_path: Path, no_waiting: None
) -> None:
    """Whatever request fails, nothing half-written is left, and afterwards all is well."""
    folder = written(tmp_path / "1", 1, 1000)
    kind = UnreachableError if status in (429, 500, 503) else CenterError
    for pattern in (*TO_PUSH, *TO_PUSH_WEIGHTS[xet], "commit/main"):
        hub.failing = [(pattern, status)]
        with pytest.raises(CenterError, match=str(status)) as caught:
            alice.push(folder, NAME)
        assert type(caught.value) is kind and caught.value.__cause__ is not None
        assert NAME not in hub.repos or "config.json" not in hub.repos[NAME].files(
            hub.repos[NAME].refs["main"]
        )
    hub.failing = []
    revision = alice.push(folder, NAME)
    for pattern in (*TO_PULL, *TO_PULL_WEIGHTS[xet]):
        hub.failing = [(pattern, status)]
        with pytest.raises(CenterError) as caught:
            alice.pull(NAME)
        assert type(caught.value) is kind, pattern
        assert caught.value.__cause__ is not None
        assert content(tmp_path / "cache") == {}
    hub.failing = []
    assert content(alice.pull(NAME)) == content(folder) and alice.pull(NAME).name == revision


@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_last_version_is_used_while_the_center_does_not_answer(
    status: int, alice: DeltaCenter, hub: HubServer, tmp_path: Path, caplog: Any
) -> None:
    revision = alice.push(written(tmp_path / "1", 1, 1000), NAME)
    folder = alice.pull(NAME)
    hub.failing = [("api/models", status)]
    assert alice.pull(NAME) == folder
    assert revision in caplog.text and str(status) in caplog.text
    with pytest.raises(UnreachableError):
        alice.pull(NAME, force_download=True)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_no_reason_to_use_an_old_version(
    status: int, alice: DeltaCenter, hub: HubServer, tmp_path: Path
) -> None:
    alice.push(written(tmp_path / "1", 1, 1000), NAME)
    alice.pull(NAME)
    hub.failing = [("api/models", status)]
    with pytest.raises(CenterError, match=str(status)):
        alice.pull(NAME)


def test_nobody_listens(tmp_path: Path, alice: DeltaCenter, hub: HubServer) -> None:
    alice.push(written(tmp_path / "1", 1, 1000), NAME)
    folder = alice.pull(NAME)
    hub.shutdown()
    hub.server_close()
    close_session()  # no connection is left from before
    assert alice.pull(NAME) == folder
    with pytest.raises(UnreachableError) as caught:
        alice.pull("alice/other")
    assert caught.value.__cause__ is not None


# --- several processes ----------------------------------------------------------------------------


def outcomes(url: str, folders: list[Path], times: int = 1) -> list[tuple[Path, str]]:
    """What came of pushing each folder, all at once and from a process each: revision or error."""
    results: Any = FORK.SimpleQueue()

    def push(folder: Path) -> None:
        for _ in range(times):
            try:
                results.put((folder, DeltaCenter.from_url(url, "hf_alice").push(folder, NAME)))
            except CenterError as error:
                assert error.__cause__ is not None
                results.put((folder, str(error)))

    in_processes([(push, (folder,)) for folder in folders])
    return [results.get() for _ in range(times * len(folders))]


def sharing_a_card(folder: Path, seed: int) -> Path:
    """Of two such deltas, the client sends only the files that differ."""
    (written(folder, seed, 1000) / "README.md").write_text("# the same card\n")
    return folder


def test_two_processes_push_one_name_at_the_same_moment(hub: HubServer, tmp_path: Path) -> None:
    """One of them succeeds, the other is told, and no version is made of both."""
    center = DeltaCenter.from_url(hub.url, "hf_alice")
    old = sharing_a_card(tmp_path / "old", 0)
    one, other = written(tmp_path / "1", 1, 1000), sharing_a_card(tmp_path / "2", 2)
    for _ in range(4):
        hub.before = []
        center.push(old, NAME)
        both = threading.Barrier(2)
        hub.before = [("commit/main", lambda wait=both.wait: wait(60))]
        [(loser, message), (winner, revision)] = sorted(
            outcomes(hub.url, [one, other]), key=lambda result: len(result[1]) == 40
        )
        assert len(revision) == 40 and {loser, winner} == {one, other}
        assert "at the same time" in message and "(412)" in message
        for asked in (None, revision):
            assert content(center.pull(NAME, asked)) == content(winner)


def test_many_processes_push_one_name(hub: HubServer, tmp_path: Path) -> None:
    folders = [written(tmp_path / str(seed), seed, 1000) for seed in range(3)]
    folders += [sharing_a_card(tmp_path / str(seed), seed) for seed in range(3, 6)]
    pushed = 0
    for folder, result in outcomes(hub.url, folders, times=3):
        if len(result) == 40:
            pushed += 1
            assert content(DeltaCenter.from_url(hub.url, "hf_alice").pull(NAME, result)) == content(
                folder
            )
        else:
            assert "at the same time" in result
    assert pushed >= 3
    assert content(DeltaCenter.from_url(hub.url).pull(NAME)) in [
        content(folder) for folder in folders
    ]


# --- what is wrong with what comes ----------------------------------------------------------------


def changed(folder: Path, **fields: Any) -> dict[str, bytes]:
    """The files of a delta with other fields in its config."""
    files = content(folder)
    config = json.loads(files["config.json"]) | fields
    return {**files, "config.json": json.dumps(config).encode()}


def wrong(folder: Path) -> dict[str, tuple[dict[str, bytes], str]]:
    good = content(folder)
    flipped = bytearray(good["model.safetensors"])
    flipped[len(flipped) // 2] ^= 1
    return {
        "no config": ({"model.safetensors": b"x"}, "config.json"),
        "a backbone's config": ({**good, "config.json": b'{"model_type": "bert"}'}, "delta_type"),
        "no JSON": ({**good, "config.json": b"<html>"}, "JSON"),
        "deep JSON": ({**good, "config.json": b"[" * 200_000}, "JSON"),
        "an endless config": ({**good, "config.json": b" " * (5 << 20)}, "bytes"),
        "truncated": ({**good, "model.safetensors": bytes(flipped)[:-9]}, "sha256"),
        "a flipped bit": ({**good, "model.safetensors": bytes(flipped)}, "sha256"),
        "no weights": ({"config.json": good["config.json"]}, "lacks model.safetensors"),
        "weights elsewhere": (changed(folder, weights_file="../../x.bin"), "'../../x.bin'"),
        "an absolute path": (changed(folder, weights_file="/etc/passwd"), "'/etc/passwd'"),
        "a list": (changed(folder, weights_file=["model.safetensors"]), "weights"),
        "a program": (changed(folder, weights_file="run.py") | {"run.py": b"1"}, "'run.py'"),
    }


CASES = [
    "no config", "a backbone's config", "no JSON", "deep JSON", "an endless config", "truncated",
    "a flipped bit", "no weights", "weights elsewhere", "an absolute path", "a list", "a program",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_repository_that_holds_no_whole_delta(case: str, hub: HubServer, tmp_path: Path) -> None:
    saved(tmp_path / "delta")
    files, words = wrong(tmp_path / "delta")[case]
    hub.hold(NAME, files)
    with pytest.raises(OpenDeltaError, match=words):
        AutoDeltaModel.from_finetuned(NAME, backbones.build("mlp"), center=hub.url)
    assert content(tmp_path / "cache") == {}


def test_only_the_files_of_a_delta_are_taken(hub: HubServer, tmp_path: Path) -> None:
    saved(tmp_path / "delta")
    good = content(tmp_path / "delta")
    more = {"setup.py": b"1", "sub/config.json": b"{}", "pytorch_model.bin": b"2"}
    hub.hold(NAME, {**good, **more})
    assert content(DeltaCenter.from_url(hub.url).pull(NAME)) == good
