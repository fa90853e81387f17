"""The page and its three actions, as a Flask application that answers only to its own link."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from flask import Flask, Response, abort, g, render_template, request
from torch import nn
from werkzeug.exceptions import HTTPException

from opendelta.exceptions import AddressingError, OpenDeltaError
from opendelta.inspection.folding import fold_names
from opendelta.web.tree import folded_tree, held_parameters

Count = Callable[[list[str]], tuple[int, float]]


def _summary(modules: int, parameters: int, share: float) -> str:
    """``"24 modules, 294,912 parameters, 0.27 %"``."""
    percent = 100 * share
    shown = "< 0.01" if 0 < percent < 0.005 else f"{percent:.2f}"
    return (
        f"{modules:,} module{'s' * (modules != 1)}, "
        f"{parameters:,} parameter{'s' * (parameters != 1)}, {shown} %"
    )


def selection_app(
    modules: dict[str, nn.Module],
    outcome: Future[list[str]],
    *,
    token: str,
    accepts_host: Callable[[str], bool],
    method: str | None = None,
    count: Count | None = None,
) -> Flask:
    """Build the application for one selection.

    Args:
        modules: the bare backbone's modules by full name, in order, the root first; they are read
            here and not again.
        outcome: receives the selected names, or an `AddressingError` if the user cancels.
        token: what ``?token=`` must say; every other request gets status 403.
        accepts_host: whether a ``Host`` header is one of this server's; if not, status 403 too.
        method: what the page says it selects for.
        count: as for `select_modules`.
    """
    app = Flask(__package__, static_folder=None)
    tree, backbone = folded_tree(modules), type(modules[""]).__name__
    counter = count or held_parameters(modules)
    one_at_a_time = threading.Lock()  # a user's counter need not be thread-safe

    @app.before_request
    def only_with_the_link() -> None:
        given = request.args.get("token", "").encode()
        if not accepts_host(request.environ.get("HTTP_HOST", "")):
            abort(403, "This page is not served under that host name.")
        if not hmac.compare_digest(given, token.encode()):
            abort(403, "Open the whole link that was printed, with its token.")

    @app.after_request
    def nothing_from_outside(response: Response) -> Response:
        nonce = g.get("nonce", "none")
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"  # the address holds the token
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.errorhandler(HTTPException)
    def as_json(error: HTTPException) -> tuple[dict[str, Any], int]:
        return {"error": error.description}, error.code or 500

    @app.get("/")
    def page() -> str:
        g.nonce = secrets.token_urlsafe(16)
        return render_template(
            "select.html",
            tree=tree,
            backbone=backbone,
            method=method,
            counted="added by the delta" if count else "held by the selected modules",
            nonce=g.nonce,
        )

    def chosen() -> list[str]:
        """The names in the request, in module order."""
        body = request.get_json()
        names = body.get("names") if isinstance(body, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            abort(400, 'Expected {"names": [...]} with full module names.')
        wanted = set(names)
        ordered = [name for name in modules if name and name in wanted]
        if len(ordered) < len(wanted):
            unknown = min(wanted.difference(ordered))
            abort(400, f"The backbone has no module called {unknown!r}.")
        return ordered

    @app.post("/count")
    def summary() -> dict[str, Any]:
        names = chosen()
        problem = False
        try:
            with one_at_a_time:
                text = _summary(len(names), *(counter(names) if names else (0, 0.0)))
        except OpenDeltaError as error:  # the method cannot modify one of these modules
            text, problem = str(error), True
        return {"text": text, "problem": problem, "patterns": list(fold_names(names).items())}

    def settle(decide: Callable[[], None]) -> dict[str, Any]:
        try:
            decide()
        except InvalidStateError:
            abort(409, "This selection is already over: it was submitted or cancelled elsewhere.")
        return {}

    @app.post("/submit")
    def submit() -> dict[str, Any]:
        names = chosen()
        if not names:
            abort(400, "Nothing is selected. Click on a module's name first, or cancel.")
        return settle(lambda: outcome.set_result(names))

    @app.post("/cancel")
    def cancel() -> dict[str, Any]:
        error = AddressingError(
            "The interactive selection was cancelled in the page, so there are no modules to "
            "modify and the backbone is as it was. Select again, or pass modified_modules."
        )
        return settle(lambda: outcome.set_exception(error))

    return app
