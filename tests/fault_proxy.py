"""A proxy on loopback that hands bytes on, and on the way back cuts, delays or changes them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class FaultProxy:
    """In front of the server at `port`.

    Attributes:
        cut_after: the connection is closed when so many bytes came back; None for never.
        delay: seconds before each piece that comes back.
        swap: bytes and what stands for them when they come back, of equal length.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.cut_after: int | None = None
        self.delay = 0.0
        self.swap: tuple[bytes, bytes] | None = None
        self.swapped = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed: the test is over
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, back in ((client, server, False), (server, client, True)):
                way = (source, sink, back)
                threading.Thread(target=self._hand_on, args=way, daemon=True).start()

    def _hand_on(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        passed = 0
        try:
            while data := source.recv(1 << 16):
                if back:
                    time.sleep(self.delay)
                    if self.swap is not None:
                        self.swapped += data.count(self.swap[0])
                        data = data.replace(*self.swap)
                    if self.cut_after is not None and passed + len(data) >= self.cut_after:
                        sink.sendall(data[: self.cut_after - passed])
                        break
                passed += len(data)
                sink.sendall(data)
        except OSError:  # the other side is gone, and so is this one
            return
        finally:
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue


@contextmanager
def in_front_of(port: int) -> Iterator[FaultProxy]:
    proxy = FaultProxy(port)
    try:
        yield proxy
    finally:
        proxy.listener.close()
