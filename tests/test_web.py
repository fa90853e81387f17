"""The interactive selection, from the terminal's side and over the wire."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from flask.testing import FlaskClient
from placed import PLACED_METHODS, hosts
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from web_selection import Backbone, Selection, selecting

import opendelta
from opendelta import AutoDeltaModel, BitFitModel, DeltaBase, LoraModel
from opendelta.exceptions import AddressingError, ConfigError, InsertionError
from opendelta.web import interactive, select_modules, selector
from opendelta.web.app import selection_app

ROOT = Path(__file__).parent.parent
Start = Callable[..., Selection]


@pytest.fixture
def start(capsys: pytest.CaptureFixture[str]) -> Iterator[Start]:
    with selecting(capsys) as function:
        yield function


def client(
    backbone: nn.Module, outcome: Future[list[str]] | None = None, **kwargs: Any
) -> FlaskClient:
    app = selection_app(
        dict(backbone.named_modules()),
        outcome or Future(),
        token="secret",
        accepts_host=lambda header: header == "localhost",
        **kwargs,
    )
    return app.test_client()


def post(flask: FlaskClient, action: str, body: Any) -> tuple[int, Any]:
    answer = flask.post(f"/{action}?token=secret", json=body)
    return answer.status_code, answer.json


# --- the way it is meant to go --------------------------------------------------------------------


def test_submission_returns_and_prints_the_modules_in_module_order(start: Start) -> None:
    backbone = Backbone()
    before = str(backbone), set(backbone.state_dict())
    selection = start(backbone)
    names = ["layer.2.attention.q", "head", "layer.0.attention.q", "head"]
    assert selection.post("submit", {"names": names}) == (200, {})
    assert selection.result() == ["layer.0.attention.q", "layer.2.attention.q", "head"]
    assert selection.printed.endswith(
        "modified_modules:\n[layer.0.attention.q, layer.2.attention.q, head]\n"
    )
    assert (str(backbone), set(backbone.state_dict())) == before


def test_interactive_is_the_same_under_its_public_name() -> None:
    assert interactive is select_modules


def test_link_binds_to_this_machine_and_tokens_are_never_the_same(start: Start) -> None:
    one, other = start(Backbone()), start(Backbone())
    assert one.link == f"http://127.0.0.1:{one.port}/?{one.query}"
    assert one.query != other.query and len(one.query) > len("token=") + 40
    assert other.request("GET", "/", query=one.query)[0] == 403


def test_cancelling_raises_and_leaves_the_backbone_alone(start: Start) -> None:
    backbone = Backbone()
    before = str(backbone), set(backbone.state_dict())
    selection = start(backbone)
    assert selection.post("cancel", {}) == (200, {})
    with pytest.raises(AddressingError, match="cancelled"):
        selection.result()
    assert "modified_modules" not in selection.printed
    assert (str(backbone), set(backbone.state_dict())) == before


def construct(
    capsys: pytest.CaptureFixture[str],
    pool: ThreadPoolExecutor,
    backbone: nn.Module,
    method: type[DeltaBase] = LoraModel,
    **kwargs: Any,
) -> tuple[Selection, Future[Any]]:
    listener, port = taken_port()
    listener.close()
    future: Future[Any] = pool.submit(method, backbone, interactive_modify=port, **kwargs)
    return Selection(capsys, future), future


def test_a_delta_goes_on_what_was_selected(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = Backbone()
    with ThreadPoolExecutor() as pool:
        selection, future = construct(capsys, pool, backbone)
        chosen = ["layer.1.attention.q", "layer.3.ff"]
        assert selection.post("submit", {"names": chosen})[0] == 200
        delta = future.result(timeout=20)
    added = set(backbone.state_dict()) - set(Backbone().state_dict())
    assert {name.partition(".lora")[0] for name in added} == set(chosen)
    assert delta.modified_modules == chosen


@pytest.mark.parametrize("method", PLACED_METHODS)
def test_the_live_count_is_what_the_method_will_add(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cls, backbone = getattr(opendelta, method), backbones.build("bert")
    total = sum(p.numel() for p in backbone.parameters())
    state = torch.get_rng_state()
    names = ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    with ThreadPoolExecutor() as pool:
        selection, future = construct(capsys, pool, backbone, cls)
        said = selection.post("count", {"names": names})[1]["text"]
        assert torch.equal(torch.get_rng_state(), state)
        selection.post("submit", {"names": names})
        delta = future.result(timeout=20)
    added = sum(p.numel() for p in delta.parameters())
    assert said == f"2 modules, {added:,} parameters, {100 * added / total:.2f} %"


def test_a_selection_is_kept_by_the_modules_own_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    backbone = backbones.build("bert")
    with ThreadPoolExecutor() as pool:
        selection, future = construct(capsys, pool, backbone, LoraModel, common_structure=True)
        selection.post("submit", {"names": ["encoder.layer.1.attention.self.key"]})
        delta = future.result(timeout=20)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    again = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=backbones.build("bert"))
    assert hosts(again) == ["encoder.layer.1.attention.self.key"]


def test_a_cancelled_construction_leaves_the_backbone_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    backbone = Backbone()
    with ThreadPoolExecutor() as pool:
        selection, future = construct(capsys, pool, backbone)
        selection.post("cancel", {})
        with pytest.raises(AddressingError, match="cancelled"):
            future.result(timeout=20)
    assert set(backbone.state_dict()) == set(Backbone().state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert not backbone._state_dict_hooks
    assert all(parameter.requires_grad for parameter in backbone.parameters())


# --- who is let in --------------------------------------------------------------------------------

REQUESTS = [
    ("GET", "/"),
    ("HEAD", "/"),
    ("OPTIONS", "/submit"),
    ("GET", "/submit"),
    ("GET", "/nowhere"),
    ("GET", "/static/select.js"),
    ("GET", "/favicon.ico"),
    ("POST", "/"),
    ("POST", "/count"),
    ("POST", "/submit"),
    ("POST", "/cancel"),
]
FORGED = [
    "",
    "token=",
    "token=wrong",
    "token=%C3%A9",
    "token=%FF",
    "TOKEN={right}",
    "token={right}x",
]


@pytest.mark.parametrize("forged", FORGED)
def test_every_path_is_forbidden_without_the_token(start: Start, forged: str) -> None:
    selection = start(Backbone())
    query = forged.replace("{right}", selection.query.removeprefix("token="))
    for method, path in REQUESTS:
        body = {"names": ["head"]} if method == "POST" else None
        status, text = selection.request(method, path, query=query, body=body)
        assert status == 403, (method, path)
        assert "embedding" not in text and selection.query not in text
    assert not selection.future.done()


HOSTS = {
    "127.0.0.1": 200,
    "localhost:8888": 200,  # a forwarded port differs from ours
    "LOCALHOST": 200,
    "[::1]:80": 200,
    "evil.example": 403,
    "evil.example:8888": 403,
    "127.0.0.1.evil.example": 403,
    "localhost.evil.example": 403,
    "evil@127.0.0.1": 403,
    "127.0.0.1:80:80": 403,
    "localhost:port": 403,
    "192.168.0.7": 403,
    "0.0.0.0": 403,
    "[evil]": 403,
    "": 403,
}


@pytest.mark.parametrize(("host", "status"), HOSTS.items())
def test_host_header_must_name_this_machine(start: Start, host: str, status: int) -> None:
    selection = start(Backbone())
    for method, path in REQUESTS:
        if status == 403:
            assert selection.request(method, path, host=host)[0] == 403, (method, path)
    assert selection.request("GET", "/", host=host)[0] == status
    assert not selection.future.done()


def test_request_without_a_host_header_is_forbidden(start: Start) -> None:
    selection = start(Backbone())
    with socket.create_connection(("127.0.0.1", selection.port), timeout=20) as raw:
        raw.sendall(f"GET /?{selection.query} HTTP/1.0\r\n\r\n".encode())
        assert raw.recv(100).split(b" ")[1] == b"403"


def test_a_given_host_is_served_and_named_in_the_link(start: Start) -> None:
    selection = start(Backbone(), host="0.0.0.0")
    name = socket.gethostname()
    assert selection.link.startswith(f"http://{name}:{selection.port}/")
    assert selection.request("GET", "/", host=f"{name}:{selection.port}")[0] == 200
    assert selection.request("GET", "/", host="10.1.2.3")[0] == 200
    assert selection.request("GET", "/", host="evil.example")[0] == 403
    assert start(Backbone(), host="localhost").link.startswith("http://localhost:")


def test_ipv6_host(start: Start) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:  # a machine without IPv6: the address is refused with a reason
        with pytest.raises(ConfigError, match="::1"):
            select_modules(Backbone(), 0, host="::1")
        return
    selection = start(Backbone(), host="::1")
    assert selection.link.startswith(f"http://[::1]:{selection.port}/")
    assert selection.request("GET", "/", to="::1")[0] == 200
    assert selection.request("POST", "/submit", to="::1", body={"names": ["head"]})[0] == 200
    assert selection.result() == ["head"]


def test_nothing_is_logged_that_holds_the_token(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        selection = start(Backbone())
        selection.request("GET", "/")
        selection.request("GET", "/nowhere")
        selection.post("submit", {"names": ["head"]})
        selection.result()
    token = selection.query.removeprefix("token=")
    assert selection.printed.count(token) == 1
    assert token not in caplog.text and selection.errors == ""


# --- bad input ------------------------------------------------------------------------------------


def test_submitting_nothing_is_explained_and_the_page_stays(start: Start) -> None:
    selection = start(Backbone())
    status, answer = selection.post("submit", {"names": []})
    assert status == 400 and answer["error"].startswith("Nothing is selected")
    assert selection.post("submit", {"names": ["head"]})[0] == 200
    assert selection.result() == ["head"]


NAMES = ['["nowhere"]', '[""]', '"head"', '[["head"]]', "null"]


@pytest.mark.parametrize("body", [f'{{"names": {n}}}' for n in NAMES] + ["{}", "[]", "null", "{"])
def test_malformed_submissions_are_refused(body: str) -> None:
    outcome: Future[list[str]] = Future()
    flask = client(Backbone(), outcome)
    for action in ("submit", "count"):
        answer = flask.post(f"/{action}?token=secret", data=body, content_type="application/json")
        assert answer.status_code == 400, action
        assert json.loads(answer.text)["error"]
    assert flask.post("/submit?token=secret", data='{"names": ["head"]}').status_code == 415
    assert flask.get("/submit?token=secret").status_code == 405
    assert not outcome.done()


def test_unknown_module_is_named() -> None:
    status, answer = post(client(Backbone()), "submit", {"names": ["head", "layer.7"]})
    assert status == 400 and "'layer.7'" in answer["error"]


def test_the_first_of_two_decisions_counts() -> None:
    for first in ("submit", "cancel"):
        outcome: Future[list[str]] = Future()
        flask = client(Backbone(), outcome)
        assert post(flask, first, {"names": ["head"]})[0] == 200
        for second in ("submit", "cancel"):
            status, answer = post(flask, second, {"names": ["embedding"]})
            assert status == 409 and "already over" in answer["error"]
        if first == "submit":
            assert outcome.result() == ["head"]


def test_two_browsers_at_once(start: Start) -> None:
    selection = start(Backbone())
    gate = threading.Barrier(2)

    def browser(name: str) -> bool:
        gate.wait()
        try:
            return selection.post("submit", {"names": [name]})[0] == 200
        except OSError:  # the server was gone already
            return False

    with ThreadPoolExecutor() as pool:
        head, embedding = pool.map(browser, ["head", "embedding"])
    assert head != embedding
    assert selection.result() == (["head"] if head else ["embedding"])


def test_backbone_without_children_is_refused_before_anything_is_served(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(AddressingError, match="Linear has no submodules"):
        select_modules(nn.Linear(2, 2), 0)
    assert capsys.readouterr().out == ""


def taken_port(neighbours: int = 1) -> tuple[socket.socket, int]:
    """A listening socket whose next `neighbours` ports are free."""
    while True:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        try:
            for offset in range(1, neighbours + 1):
                socket.create_server(("127.0.0.1", port + offset)).close()
            return listener, port
        except OSError:
            listener.close()


def test_next_free_port_is_used_and_said(start: Start) -> None:
    listener, port = taken_port()
    with listener:
        selection = start(Backbone(), port=port)
        assert selection.port == port + 1
        assert f"Port {port} is taken; using the next free one, {port + 1}." in selection.printed
        assert selection.request("GET", "/")[0] == 200


def test_free_port_is_used_without_ado(start: Start) -> None:
    listener, port = taken_port()
    listener.close()
    selection = start(Backbone(), port=port)
    assert selection.port == port
    assert "taken" not in selection.printed


def test_the_same_port_serves_the_next_selection_at_once(start: Start) -> None:
    listener, port = taken_port()
    listener.close()
    for _ in range(2):
        selection = start(Backbone(), port=port)
        assert selection.port == port
        # the server ends this connection, after which the system keeps its end for a while
        with socket.create_connection(("127.0.0.1", port)):
            time.sleep(0.1)
            selection.post("submit", {"names": ["head"]})
            selection.result()


def test_no_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "PORTS_TO_TRY", 0)
    listener, port = taken_port()
    with listener, pytest.raises(ConfigError, match=f"No port from {port} to {port} is free"):
        select_modules(Backbone(), port)


@pytest.mark.parametrize("port", [True, -1, 65536, "8888", 8888.0, None])
def test_impossible_ports(port: Any) -> None:
    with pytest.raises(ConfigError, match=r"port=.*expected an integer from 0 to 65535"):
        select_modules(Backbone(), port)


def test_impossible_host() -> None:
    with pytest.raises(ConfigError, match="'no such host'"):
        select_modules(Backbone(), 0, host="no such host")
    with pytest.raises(ConfigError, match="192.0.2.1"):  # reserved: no machine has it
        select_modules(Backbone(), 0, host="192.0.2.1")


# --- nothing is left behind -----------------------------------------------------------------------


def refuses_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("action", ["submit", "cancel"])
def test_server_and_threads_stop(start: Start, action: str) -> None:
    before = set(threading.enumerate())
    selection = start(Backbone())
    # what browsers do: a connection opened in advance, with nothing sent
    with socket.create_connection(("127.0.0.1", selection.port)):
        time.sleep(0.1)
        begun = time.monotonic()
        selection.post(action, {"names": ["head"]})
        selection.future.exception(timeout=20)
        assert time.monotonic() - begun < 2
    left = {thread for thread in threading.enumerate() if thread not in before}
    assert [thread.name for thread in left if "ThreadPoolExecutor" not in thread.name] == []
    assert refuses_connections(selection.port)


def test_a_running_count_ends_before_the_selection_returns(start: Start) -> None:
    begun, release = threading.Event(), threading.Event()

    def count(names: list[str]) -> tuple[int, float]:
        begun.set()
        release.wait(20)
        return 1, 0.5

    selection = start(Backbone(), count=count)
    with ThreadPoolExecutor() as pool:
        counting = pool.submit(selection.post, "count", {"names": ["head"]})
        assert begun.wait(20)
        assert selection.post("submit", {"names": ["head"]})[0] == 200
        time.sleep(0.5)
        assert not selection.future.done()
        release.set()
        assert counting.result()[1]["text"] == "1 module, 1 parameter, 50.00 %"
    assert selection.result() == ["head"]


PROGRAM = """
    import signal, threading
    from torch import nn
    from opendelta.web import select_modules

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, also where the
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests run in the background and ignore both
    backbone = nn.Sequential(nn.Linear(2, 2))
    try:
        select_modules(backbone, 0)
    except KeyboardInterrupt:
        print("interrupted", [thread.name for thread in threading.enumerate()], flush=True)
"""


def run_program() -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    link = next(line for line in process.stdout if "/?token=" in line)
    return process, int(link.split(":")[2].split("/")[0])


def test_ctrl_c_stops_the_server() -> None:
    process, port = run_program()
    with socket.create_connection(("127.0.0.1", port)):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("interrupted ['MainThread']\n", "", 0)
    assert refuses_connections(port)


def test_closing_the_terminal_stops_the_server() -> None:
    process, port = run_program()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert refuses_connections(port)


# --- the count ------------------------------------------------------------------------------------


def test_count_of_a_method() -> None:
    asked: list[list[str]] = []

    def count(names: list[str]) -> tuple[int, float]:
        asked.append(names)
        return 294912, 294912 / 109482240

    flask = client(Backbone(), count=count)
    names = [f"layer.{i}.attention.{p}" for p in "qv" for i in range(4)]
    status, answer = post(flask, "count", {"names": names})
    assert status == 200
    assert answer["text"] == "8 modules, 294,912 parameters, 0.27 %"
    assert answer["patterns"] == [
        [f"layer.0-3.attention.{p}", [f"layer.{i}.attention.{p}" for i in range(4)]] for p in "qv"
    ]
    assert asked == [[f"layer.{i}.attention.{p}" for i in range(4) for p in "qv"]]


def test_count_without_a_method_is_what_the_modules_hold() -> None:
    backbone = Backbone()
    total = 10 * 8 + 4 * (2 * 72 + 8 * 16 + 16) + 10  # the head's weight is the embedding's
    flask = client(backbone)

    def text(*names: str) -> str:
        return post(flask, "count", {"names": list(names)})[1]["text"]

    assert text("head") == f"1 module, 90 parameters, {100 * 90 / total:.2f} %"
    assert text("head", "embedding") == f"2 modules, 90 parameters, {100 * 90 / total:.2f} %"
    assert text("layer.0.attention", "layer.0.attention.q").startswith("2 modules, 144 parameters")
    assert text("layer.1") == f"1 module, 288 parameters, {100 * 288 / total:.2f} %"
    assert text() == "0 modules, 0 parameters, 0.00 %"


def test_tiny_shares_are_not_shown_as_nothing() -> None:
    flask = client(Backbone(), count=lambda names: (12, 1e-6))
    assert post(flask, "count", {"names": ["head"]})[1]["text"].endswith("12 parameters, < 0.01 %")


def test_a_method_that_refuses_the_modules_says_so_in_the_page() -> None:
    def count(names: list[str]) -> tuple[int, float]:
        raise InsertionError("LoRA needs a linear module; 'embedding' is an Embedding.")

    status, answer = post(client(Backbone(), count=count), "count", {"names": ["embedding"]})
    assert status == 200 and answer["problem"] is True
    assert answer["text"] == "LoRA needs a linear module; 'embedding' is an Embedding."
    assert answer["patterns"] == [["embedding", ["embedding"]]]


# --- the tree and the page ------------------------------------------------------------------------


Nodes = list[dict[str, Any]]


def outline(nodes: Nodes) -> dict[str, Any]:
    return {node["label"]: outline(node["children"]) for node in nodes}


def tree(backbone: nn.Module) -> Nodes:
    """The tree that the page is given."""
    nodes: Nodes = json.loads(Page(page(backbone)).data)
    return nodes


BLOCK: dict[str, Any] = {"attention": {"q": {}, "v": {}}, "ff": {}}


def test_numbered_repeats_fold() -> None:
    nodes = tree(Backbone())
    assert outline(nodes) == {"embedding": {}, "layer": {"0-3": BLOCK}, "head": {}}
    repeated = nodes[1]["children"][0]
    assert repeated["names"] == ["0", "1", "2", "3"] and repeated["type"] == "Block"
    assert repeated["children"][1]["parameters"] == ["weight [16, 8]", "bias [16]"]


def test_only_siblings_of_the_same_structure_fold() -> None:
    nodes = tree(Backbone(inner=(16, 32, 16, 16)))
    assert outline(nodes)["layer"] == {"0,2-3": BLOCK, "1": BLOCK}
    backbone = Backbone()
    del backbone.get_submodule("layer.2.attention").v
    backbone.get_submodule("layer.3.ff").register_parameter("bias", None)
    assert list(outline(tree(backbone))["layer"]) == ["0-1", "2", "3"]
    named = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "01": nn.Linear(2, 2)})
    assert list(outline(tree(named))) == ["a", "b", "01"]


def test_first_block_of_t5_stays_apart() -> None:
    config = T5Config(num_layers=6, d_model=8, d_kv=2, d_ff=8, num_heads=4, vocab_size=10)
    nodes = outline(tree(T5ForConditionalGeneration(config)))
    assert list(nodes["encoder"]["block"]) == list(nodes["decoder"]["block"]) == ["0", "1-5"]
    attention = nodes["encoder"]["block"]["0"]["layer"]["0"]["SelfAttention"]
    assert list(attention) == ["q", "k", "v", "o", "relative_attention_bias"]


def test_deltas_are_neither_shown_nor_counted_and_do_not_hinder_folding(start: Start) -> None:
    backbone, bare = Backbone(), Backbone()
    for model in (backbone, bare):
        for i in range(4):
            model.get_submodule(f"layer.{i}.ff").register_parameter("bias", None)
    LoraModel(backbone, modified_modules=["layer.1.attention.q"])
    BitFitModel(backbone, modified_modules=["layer.2.ff", "layer.3.attention.q"])
    with_deltas = set(backbone.state_dict())
    modified, plain = start(backbone), start(bare)
    pages = [Page(selection.request("GET", "/")[1]).data for selection in (modified, plain)]
    assert len(pages[0]) > 100 and pages[0] == pages[1]
    for names in (["layer.1"], ["layer.2.ff"], ["layer.1.attention.q", "head"]):
        answers = [selection.post("count", {"names": names}) for selection in (modified, plain)]
        assert answers[0] == answers[1]
    assert modified.post("submit", {"names": ["layer.1.attention.q.lora"]})[0] == 400
    assert set(backbone.state_dict()) == with_deltas != set(bare.state_dict())


def test_lazy_parameters_are_shown_and_count_nothing() -> None:
    backbone = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1, bias=False))
    assert tree(backbone)[0]["parameters"] == ["weight [lazy]", "bias [lazy]"]
    text = post(client(backbone), "count", {"names": ["0", "1"]})[1]["text"]
    assert text == "2 modules, 4 parameters, 100.00 %"


class Page(HTMLParser):
    """Attributes that load something, scripts by type, and how many tags there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.data = ""
        self._in_data = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "action", "srcset")]
        self._in_data = tag == "script" and dict(attrs).get("type") == "application/json"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False


def page(backbone: nn.Module, **kwargs: Any) -> str:
    return client(backbone, **kwargs).get("/?token=secret").text


def test_page_uses_no_outside_asset() -> None:
    answer = client(Backbone()).get("/?token=secret")
    assert all(address.startswith("data:") for address in Page(answer.text).loads)
    assert "@import" not in answer.text and "url(" not in answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "http" not in policy
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"


HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; alert(1); '",
    "<!--<script>",
    "{{ 7*7 }}",
]


def test_names_cannot_break_out_of_the_page() -> None:
    hostile = nn.ModuleDict({name: nn.Linear(2, 2) for name in HOSTILE})
    hostile_class = type("<b>Odd</b>", (nn.Sequential,), {})
    html = page(nn.Sequential(hostile, hostile_class(nn.ReLU())), method="<i>lora</i>")
    parsed, plain = Page(html), Page(page(nn.Sequential(nn.Linear(2, 2)), method="lora"))
    assert parsed.tags == plain.tags
    shown = json.loads(parsed.data)
    assert [node["label"] for node in shown[0]["children"]] == HOSTILE
    assert "<i>lora" not in html and "<b>Odd" not in html


def test_hostile_names_come_back_as_they_are(start: Start) -> None:
    selection = start(nn.ModuleDict({name: nn.Linear(2, 2) for name in HOSTILE}))
    assert selection.post("submit", {"names": HOSTILE})[0] == 200
    assert selection.result() == HOSTILE


def test_the_backbone_and_the_method_are_named() -> None:
    assert "Backbone" in page(Backbone()) and "<b>lora</b>" in page(Backbone(), method="lora")
    assert "held by the selected modules" in page(Backbone())
    assert "added by the delta" in page(Backbone(), count=lambda names: (0, 0.0))


def test_deep_models_send_one_block() -> None:
    with torch.device("meta"):
        xl = GPT2LMHeadModel(GPT2Config(n_layer=48, n_embd=1600, n_head=25))
        small = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=1600, n_head=25))
    begun = time.perf_counter()
    html = page(xl)
    assert time.perf_counter() - begun < 1
    assert len(html) < len(page(small)) + 1000
