"""The Hub's client as the tests use it: apart from the user's own settings, and in no hurry."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._xet import XET_CONNECTION_INFO_CACHE, abort_xet_session


def set_apart(monkeypatch: pytest.MonkeyPatch, folder: Path, xet: bool) -> None:
    """Neither the user's token nor the user's caches; large files by Xet or by LFS."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name in ("HF_TOKEN", "DELTACENTER_URL", "DELTACENTER_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_XET_CACHE", str(folder / "xet"))
    monkeypatch.setenv("HF_XET_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")
    abort_xet_session()  # the next one reads these
    XET_CONNECTION_INFO_CACHE.clear()  # the next server may have the same port


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits some seconds before it tries again; not so here."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
