"""What the web tests share: a small backbone, and a selection that runs in a thread."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from torch import nn

from opendelta.web import select_modules


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self, inner: int = 16) -> None:
        super().__init__()
        self.attention = Attention()
        self.ff = nn.Linear(8, inner)


class Backbone(nn.Module):
    """Four blocks between an embedding and a head that is tied to it."""

    def __init__(self, inner: tuple[int, ...] = (16, 16, 16, 16)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layer = nn.ModuleList(Block(width) for width in inner)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embedding.weight


class Selection:
    """A running `select_modules`: its link, what it printed, its result, and requests to it."""

    def __init__(self, capsys: pytest.CaptureFixture[str], result: Future[Any]) -> None:
        self._capsys = capsys
        self.future = result
        self._printed = ""
        self.errors = ""  # what went to standard error so far
        deadline = time.monotonic() + 20
        while "/?token=" not in self.printed:
            if result.done():
                result.result()
            assert time.monotonic() < deadline, f"no link in {self._printed!r}"
            time.sleep(0.01)
        self.link = next(line for line in self._printed.splitlines() if "/?token=" in line)
        parts = urlsplit(self.link)
        self.port, self.query = parts.port or 0, parts.query

    @property
    def printed(self) -> str:
        out, err = self._capsys.readouterr()
        self._printed += out
        self.errors += err
        return self._printed

    def result(self) -> Any:
        return self.future.result(timeout=20)

    def request(
        self,
        method: str,
        path: str,
        *,
        query: str | None = None,
        body: Any = None,
        host: str | None = None,
        to: str = "127.0.0.1",
    ) -> tuple[int, str]:
        """Status and text of one request, by default with the right token and ``Host``."""
        query = self.query if query is None else query
        headers = {} if host is None else {"Host": host}
        payload = None
        if body is not None:
            payload = body if isinstance(body, (str, bytes)) else json.dumps(body)
            headers["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection(to, self.port, timeout=20)
        try:
            target = f"{path}?{query}" if query else path
            connection.request(method, target, body=payload, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def post(self, action: str, body: Any) -> tuple[int, dict[str, Any]]:
        status, text = self.request("POST", f"/{action}", body=body)
        return status, json.loads(text)


@contextmanager
def selecting(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Selection]]:
    """A function that starts selections; those still open at the end are cancelled."""
    started: list[Selection] = []
    with ThreadPoolExecutor() as pool:

        def start(backbone: nn.Module, **kwargs: Any) -> Selection:
            future = pool.submit(select_modules, backbone, **{"port": 0, **kwargs})
            started.append(Selection(capsys, future))
            return started[-1]

        try:
            yield start
        finally:
            for selection in started:
                if not selection.future.done():
                    selection.post("cancel", {})
