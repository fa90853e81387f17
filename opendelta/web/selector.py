"""`select_modules`: serve the page, wait for the user, leave nothing behind."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import secrets
import socket
import socketserver
import threading
from concurrent.futures import Future, wait
from typing import cast

from flask import Flask
from torch import nn
from werkzeug.serving import WSGIRequestHandler, make_server

from opendelta.exceptions import AddressingError, ConfigError
from opendelta.mechanism.backbone_state import bare
from opendelta.mechanism.ownership import own_modules
from opendelta.web.app import Count, selection_app

PORTS_TO_TRY = 100
_HOST_HEADER = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]+)(?::\d+)?")


def select_modules(
    backbone: nn.Module,
    port: int = 8888,
    *,
    host: str = "127.0.0.1",
    method: str | None = None,
    count: Count | None = None,
) -> list[str]:
    """Let the user click on modules in a web page (specification 1.15.3).

    Prints a link and waits until the page is submitted, cancelled, or interrupted with Ctrl-C; by
    the time this function returns or raises, the server and its threads are gone. The link holds a
    token that is good for this one selection: without it, or under a foreign ``Host``, nothing is
    served. The backbone stays as it is. Works in notebooks too, where the kernel waits.

    On submission the selection is printed as::

        modified_modules:
        [encoder.layer.0.query, encoder.layer.1.query]

    Args:
        backbone: the model whose modules are shown; deltas that it already has are left out.
        port: where to serve; if taken, the next free port is used and named. 0: any free port.
        host: address to bind to. The default is reachable from this machine only (and through
            port forwarding); ``"0.0.0.0"`` lets in whoever has the link.
        method: name of the method that will modify the modules, shown in the page.
        count: maps full module names to the number of parameters that the method would add and
            their share of the whole, between 0 and 1; both are shown live, as is the message of an
            `OpenDeltaError` that it raises. Default: the parameters that the selected modules
            hold, and their share of the backbone.

    Returns:
        Full names of the selected modules, in module order, at least one.

    Raises:
        AddressingError: if the user cancels, or the backbone has no submodule to select.
        ConfigError: if `port` or `host` cannot be used.
        KeyboardInterrupt: on Ctrl-C, after the server has stopped.
    """
    outcome: Future[list[str]] = Future()
    token = secrets.token_urlsafe(32)
    with bare(backbone):
        modules = dict(own_modules(backbone))
        if len(modules) == 1:
            raise AddressingError(
                f"{type(backbone).__name__} has no submodules, so there is nothing to select: a "
                "delta sits on a module inside the backbone. Pass the model that contains it."
            )
        app = selection_app(
            modules,
            outcome,
            token=token,
            accepts_host=lambda header: _is_ours(header, host),
            method=method,
            count=count,
        )
    server = _Server(app, host, port)
    try:
        if port not in (0, server.port):
            print(f"Port {port} is taken; using the next free one, {server.port}.")
        print("Open this link to select the modules to modify (Ctrl-C here gives up):")
        print(f"http://{_shown(host)}:{server.port}/?token={token}", flush=True)
        # Waiting in slices: on Windows, Ctrl-C does not end a wait without a timeout.
        while not wait([outcome], timeout=0.2).done:
            pass
    finally:
        server.stop()
    names = outcome.result()
    print("modified_modules:")
    print(f"[{', '.join(names)}]", flush=True)
    return names


interactive = select_modules


class _Server:
    """A threaded werkzeug server that runs from construction to `stop`."""

    def __init__(self, app: Flask, host: str, port: int) -> None:
        connections: set[socket.socket] = set()

        class Handler(WSGIRequestHandler):
            timeout = 5.0  # seconds for which a silent client keeps its thread

            def setup(self) -> None:
                connections.add(self.request)
                super().setup()

            def finish(self) -> None:
                super().finish()
                connections.discard(self.request)

            def log(self, type: str, message: str, *args: object) -> None:
                """Say nothing: request lines hold the token."""

        with _listen(host, port) as listener:
            self.port: int = listener.getsockname()[1]
            self._server = make_server(
                host, self.port, app, threaded=True, request_handler=Handler, fd=listener.fileno()
            )
        # Threads that answer requests are waited for: the browser gets its answer, and no count
        # still reads the backbone, when the selection returns.
        cast(socketserver.ThreadingMixIn, self._server).daemon_threads = False
        self._connections = connections
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="opendelta-select", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Finish the requests that are being answered, and end every thread."""
        self._server.shutdown()
        for connection in tuple(self._connections):  # browsers keep idle ones open
            with contextlib.suppress(OSError):  # closed by the browser in the meantime
                connection.shutdown(socket.SHUT_RD)
        self._thread.join()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket on `port` or, where that is taken, on the next free one."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise ConfigError(f"port={port!r}: expected an integer from 0 to 65535, such as 8888.")
    last = min(port + PORTS_TO_TRY, 65535)
    for candidate in range(port, last + 1):
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if os.name == "posix":  # elsewhere this option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                reason = f"Cannot serve on host {host!r}, port {port}: {error}."
                raise ConfigError(reason) from error
    raise ConfigError(f"No port from {port} to {last} is free on {host!r}. Name another port.")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that `name` stands for, with or without brackets; None for other names."""
    try:
        return ipaddress.ip_address("127.0.0.1" if name == "localhost" else name.strip("[]"))
    except ValueError:
        return None


def _is_ours(header: str, host: str) -> bool:
    """Whether a ``Host`` header may name a server bound to `host`.

    A page elsewhere can point its own host name at this machine, but cannot make the browser send
    another name than its own. The port is free: a forwarded one differs from ours.
    """
    match = _HOST_HEADER.fullmatch(header.lower())
    if match is None:
        return False
    name, bound = match[1], _address(host)
    address = _address(name)
    if bound is None or address is None:
        return name == _shown(host).lower()
    return bound.is_unspecified or bound == address or (bound.is_loopback and address.is_loopback)


def _shown(host: str) -> str:
    """How the link names `host`."""
    bound = _address(host)
    if bound is not None and bound.is_unspecified:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
