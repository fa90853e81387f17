"""Each test runs in a folder of its own that holds the checkpoints, and reaches no network."""

from __future__ import annotations

import shutil
from pathlib import Path

import checkpoints
import pytest
import torch


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoints and, in `center`, of the published deltas."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints.save_backbones(folder)
    checkpoints.publish_deltas(folder, (folder / "center").as_uri())
    return folder


@pytest.fixture(autouse=True)
def _user_folder(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(stored, tmp_path / "user")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DELTACENTER_URL", (folder / "center").as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
