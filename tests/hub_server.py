"""A server on loopback that speaks the Hub's HTTP API, as far as deltas need it.

Users and tokens are given, commits are folders of real files on disk, and large files come by LFS
or by Xet. It knows what the Hub does when something is not there or not allowed, and can be told to
fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from xet_format import Malformed
from xet_server import XetStore

LFS_SUFFIXES = (".safetensors", ".bin")
TOKENS = {"hf_alice": ("alice", True), "hf_reader": ("alice", False), "hf_bob": ("bob", True)}


class Refused(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


@dataclass
class Repo:
    folder: Path
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    pulls: int = 0

    def commit(self, parent: str | None, changes: dict[str, bytes]) -> str:
        files = {} if parent is None else self.files(parent)
        files |= changes
        text = json.dumps([parent, {k: hashlib.sha1(v).hexdigest() for k, v in files.items()}])
        oid = hashlib.sha1(text.encode()).hexdigest()
        (self.folder / oid).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.folder / oid / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / oid / name).write_bytes(content)
        return oid

    def files(self, oid: str) -> dict[str, bytes]:
        root = self.folder / oid
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    def tags(self) -> list[str]:
        """What the card says that it is."""
        data = metadata(self.files(self.refs["main"]).get("README.md", b"").decode())
        return [data.get("library_name", ""), *data.get("tags", ())]

    def resolve(self, revision: str) -> str:
        revision = unquote(revision)
        if revision in self.refs:
            return self.refs[revision]
        if re.fullmatch("[0-9a-f]{40}", revision) and (self.folder / revision).is_dir():
            return revision
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class HubServer(ThreadingHTTPServer):
    """The state: repositories by name, large files by sha256, what was asked, what to refuse."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.lfs = root / "lfs"
        self.lfs.mkdir(parents=True)
        self.xet = XetStore(root / "xet")
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.failing: list[tuple[str, int]] = []  # (pattern of "METHOD path", status)
        self.before: list[tuple[str, Callable[[], Any]]] = []  # (pattern, what happens first)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def hold(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Put files into a repository without asking; the commit."""
        repo = self.repos.setdefault(name, Repo(self.root / name.replace("/", "--"), private))
        repo.refs["main"] = repo.commit(None, files)
        return repo.refs["main"]


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Requests are kept in `HubServer.requests` instead."""

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        asked = f"{self.command} {url.path}"
        self.server.requests.append((self.command, url.path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for pattern, status in self.server.failing:
                if re.search(pattern, asked):
                    raise Refused(status, "as the test asks")
            for pattern, happen in self.server.before:
                if re.search(pattern, asked):
                    happen()
            for pattern, answer in ROUTES:
                found = re.fullmatch(pattern, asked)
                if found:
                    with self.server.lock:
                        answer(self, **found.groupdict())
                    return
            raise Refused(404, f"no such route: {asked}")
        except Malformed as error:
            self.answer(400, {"error": str(error)})
        except Refused as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.answer(error.status, {"error": error.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(
        self, status: int = 200, content: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def base(self) -> str:
        """As the client calls this server, which may be through a proxy."""
        return f"http://{self.headers['Host']}"

    @property
    def store(self) -> str:
        """For large files: another host, as on the Hub."""
        return self.base.replace("127.0.0.1", "localhost")

    # --- who asks -----------------------------------------------------------------------------

    def user(self) -> tuple[str, bool] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        if given not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[given]

    def writer(self, name: str) -> str:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if not user[1] or user[0] != name.split("/")[0]:
            raise Refused(403, "You don't have the rights to write here.")
        return user[0]

    def repo(self, name: str) -> Repo:
        user, repo = self.user(), self.server.repos.get(name)
        if repo is None or (repo.private and (user is None or user[0] != name.split("/")[0])):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    # --- answers ------------------------------------------------------------------------------

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        self.answer(content={"type": "user", "name": user[0], "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        user = self.user()
        owner = asked.get("organization") or (user[0] if user else "")
        name = f"{owner}/{asked['name']}"
        self.writer(name)
        url = f"{self.base}/{name}"
        if name in self.server.repos:
            self.answer(409, {"error": "You already created this model repo", "url": url})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = Repo(self.server.root / name.replace("/", "--"), private)
        repo.refs["main"] = repo.commit(None, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repos[name] = repo
        self.answer(content={"url": url, "name": name})

    def validate_yaml(self) -> None:
        try:
            data = metadata(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
            return
        wrong = [k for k in ("tags", "datasets") if not isinstance(data.get(k, []), list)]
        errors = [{"message": f'"{key}" must be a list'} for key in wrong]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, name: str, branch: str) -> None:
        self.writer(name)
        repo, branch = self.repo(name), unquote(branch)
        if branch in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self.answer(201, {})

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        if "create_pr" not in self.query:
            self.writer(name)
        held = {e["path"]: e for e in described(repo.files(repo.resolve(revision)))}
        known = {p: e["lfs"]["oid"] if "lfs" in e else e["oid"] for p, e in held.items()}
        files = [
            {
                "path": file["path"],
                "oid": known.get(file["path"]),
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(content={"files": files})

    def batch(self, name: str) -> None:
        self.repo(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            known = (self.server.lfs / asked["oid"]).exists()
            upload = {"upload": {"href": f"{self.base}/lfs/{asked['oid']}"}}
            objects.append({**asked, **({} if known else {"actions": upload})})
        self.answer(content={"transfer": "basic", "objects": objects})

    def receive(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not what its name says")
        (self.server.lfs / oid).write_bytes(self.body)
        self.answer(content={})

    def commit(self, name: str, revision: str) -> None:
        repo, revision = self.repo(name), unquote(revision)
        as_pull = "create_pr" in self.query
        if not as_pull:
            self.writer(name)
        elif self.user() is None:
            raise Refused(401, "Invalid username or password.")
        parent, changes = repo.resolve(revision), {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", parent) != parent:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            if item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changes[value["path"]] = (self.server.lfs / value["oid"]).read_bytes()
        oid = repo.commit(parent, changes)
        content = {"commitUrl": f"{self.base}/{name}/commit/{oid}", "commitOid": oid}
        if as_pull:
            repo.pulls += 1
            revision = f"refs/pr/{repo.pulls}"
            content["pullRequestUrl"] = f"{self.base}/{name}/discussions/{repo.pulls}"
        repo.refs[revision] = oid
        self.answer(content=content)

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self.repo(name)
        oid = repo.resolve(revision or "main")
        siblings = [
            {"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]}
            | ({"lfs": {"sha256": file["lfs"]["oid"], "size": file["size"], "pointerSize": 130}}
               if "lfs" in file else {})
            for file in described(repo.files(oid))
        ]  # fmt: skip
        told = {"id": name, "modelId": name, "sha": oid, "private": repo.private, "tags": []}
        self.answer(content={**told, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        self.answer(content=described(repo.files(repo.resolve(revision))))

    def models(self) -> None:
        wanted, user = self.query.get("search", [""])[0], self.user()
        tag = self.query.get("filter", [""])[0]
        names = [
            name
            for name, repo in self.server.repos.items()
            if wanted in name and (not repo.private or (user and user[0] == name.split("/")[0]))
            if not tag or tag in repo.tags()
        ]
        self.answer(content=[{"id": name, "modelId": name, "tags": []} for name in names])

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.repo(name)
        oid, file = repo.resolve(revision), unquote(file)
        files = repo.files(oid)
        if file not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        [entry] = described({file: files[file]})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{entry["oid"]}"'}
        if "lfs" not in entry:
            self.send_range(files[file], headers)
            return
        sha = entry["lfs"]["oid"]
        (self.server.lfs / sha).write_bytes(files[file])
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(entry["size"])}
        if sha in self.server.xet.hash_of:
            route = f"{self.base}/api/models/{name}/xet-read-token/{oid}"
            headers |= {"X-Xet-Hash": self.server.xet.hash_of[sha]}
            headers |= {"Link": f'<{route}>; rel="xet-auth"'}
        self.answer(302, b"", {**headers, "Location": f"{self.store}/lfs/{sha}"})

    def send_lfs(self, oid: str) -> None:
        if not (self.server.lfs / oid).exists():
            raise Refused(404, "no such object")
        self.send_range((self.server.lfs / oid).read_bytes(), {"ETag": f'"{oid}"'})

    def send_range(self, content: bytes, headers: dict[str, str]) -> None:
        asked = self.asked_range(len(content))
        if asked is None:
            self.answer(200, content, headers)
            return
        start, end = asked
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(206, content[start : end + 1], headers)

    def asked_range(self, size: int) -> tuple[int, int] | None:
        """First and last byte that are asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return None
        if int(asked[1]) >= size:
            raise Refused(416, "begins behind the end")
        return int(asked[1]), min(int(asked[2] or size), size - 1)

    # --- the Xet protocol ---------------------------------------------------------------------

    def xet_token(self, kind: str, name: str, revision: str) -> None:
        self.repo(name)
        if kind == "write" and "create_pr" not in self.query:
            self.writer(name)
        token = f"xet_{len(self.server.xet.may_write)}"
        self.server.xet.may_write[token] = kind == "write"
        told = {"casUrl": self.store, "accessToken": token, "exp": int(time.time()) + 3600}
        names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
        self.answer(content=told, headers=dict(zip(names, map(str, told.values()), strict=True)))

    def check_xet_token(self, to_write: bool) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.server.xet.may_write:
            raise Refused(401, "no token of this store")
        if to_write and not self.server.xet.may_write[token]:
            raise Refused(403, "a token to read")

    def receive_xorb(self, xorb: str) -> None:
        self.check_xet_token(to_write=True)
        self.server.xet.add_xorb(xorb, self.body)
        self.answer(content={"was_inserted": True})

    def receive_shard(self) -> None:
        self.check_xet_token(to_write=True)
        for sha, content in self.server.xet.add_shard(self.body):
            (self.server.lfs / sha).write_bytes(content)
        self.answer(content={"result": 1})

    def reconstruction(self, file: str) -> None:
        self.check_xet_token(to_write=False)
        xet = self.server.xet
        if file not in xet.terms:
            raise Refused(404, "no such file")
        size = sum(term.size for term in xet.terms[file])
        first, last = self.asked_range(size) or (0, size - 1)
        self.answer(content=xet.reconstruction(file, first, last, f"{self.base}/xorbs"))

    def send_xorb(self, xorb: str) -> None:
        self.send_range((self.server.xet.folder / xorb).read_bytes(), {})


REPO = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch),
    (rf"POST /api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    (rf"GET /api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    (rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"GET /api/models/{REPO}", Handler.info),
    (r"GET /api/models", Handler.models),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.receive),
    (r"(?:GET|HEAD) /lfs/(?P<oid>\w+)", Handler.send_lfs),
    (rf"GET /api/models/{REPO}/xet-(?P<kind>read|write)-token/(?P<revision>.+)", Handler.xet_token),
    (r"POST /v1/xorbs/default/(?P<xorb>\w+)", Handler.receive_xorb),
    (r"POST /v1/shards", Handler.receive_shard),
    (r"GET /v1/reconstructions/(?P<file>\w+)", Handler.reconstruction),
    (r"GET /xorbs/(?P<xorb>\w+)", Handler.send_xorb),
    (rf"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
]


def metadata(card: str) -> dict[str, Any]:
    """The YAML at the top of a card."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


def described(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Entries of a tree, as the Hub tells them."""
    entries = []
    for path, content in files.items():
        blob = content
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        if path.endswith(LFS_SUFFIXES):
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            head = "version https://git-lfs.github.com/spec/v1"
            blob = f"{head}\noid sha256:{sha}\nsize {len(content)}\n".encode()
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        entries.append(entry)
    return entries


@contextmanager
def serving(root: Path) -> Iterator[HubServer]:
    """A running server that keeps its files below `root`."""
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
