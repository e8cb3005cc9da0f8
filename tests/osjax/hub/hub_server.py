"""A server on loopback that answers like the Hugging Face Hub, and fails as it is told to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"
GATED, MISSING = "GatedRepo", "RepoNotFound"


@dataclasses.dataclass
class Hub:
    """Repositories {name: {path: content}} and what goes wrong with them; `seen` is filled with the requests."""

    repos: dict[str, dict[str, bytes]]
    token: str | None = None  # without which nothing is given
    gated: bool = False  # the list is open, the files are for those with the token
    breaks: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # bytes sent before each broken connection
    stall: float = 0.0  # seconds that a connection hangs before it breaks
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # claims instead of the truth
    spoiled: set[str] = dataclasses.field(default_factory=set)  # sent with other bytes than listed
    statuses: list[int] = dataclasses.field(default_factory=list)  # of the next answers that are files
    ranges: bool = True
    elsewhere: bool = False  # files come from another host
    vanished: set[str] = dataclasses.field(default_factory=set)  # listed, but not there
    endpoint: str = ""
    seen: list[Request] = dataclasses.field(default_factory=list)

    def sent(self, path: str) -> list[str | None]:
        """The ranges that were asked for of the file at `path`."""
        return [request.range for request in self.seen if request.path.endswith(f"/{path}")]


@dataclasses.dataclass(frozen=True)
class Request:
    host: str
    path: str
    range: str | None
    authorization: str | None


@contextlib.contextmanager
def serve(hub: Hub, handler: type[Handler] | None = None) -> Iterator[Hub]:
    """Runs the server inside the block, at `hub.endpoint`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler or Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        host, asked, authorization = (self.headers.get(name) for name in ("Host", "Range", "Authorization"))
        self.hub.seen.append(Request(host, path, asked, authorization))
        self.respond(path, asked, authorization)

    def respond(self, path: str, asked: str | None, authorization: str | None) -> None:
        """Answers for the range `asked` of what is at `path`."""
        allowed = self.hub.token is None or authorization == f"Bearer {self.hub.token}"
        if authorization and not allowed:
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._list(*found.groups(), allowed or self.hub.gated)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*found.groups(), allowed)
        elif found := re.fullmatch(r"/elsewhere/([^/]+/[^/]+)/(.+)", path):
            self.send(self.hub.repos[found[1]][found[2]], found[2], asked)
        elif path.startswith("/login"):
            self.answer(200, b"<html>Welcome to our network</html>")
        else:
            self.refuse(404)

    def _list(self, repo: str, revision: str | None, allowed: bool) -> None:
        if repo not in self.hub.repos or not allowed:
            self.refuse(404 if allowed else 401, MISSING)
        elif revision not in (None, "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            siblings = [self._sibling(path, content) for path, content in self.hub.repos[repo].items()]
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def _sibling(self, path: str, content: bytes) -> dict[str, object]:
        """What the hub tells of a file: large ones by their SHA-256, small ones by their name in Git."""
        size = self.hub.sizes.get(path, len(content))
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 135}
        sibling = {"rfilename": path, "size": size, "blobId": blob}
        return {**sibling, "lfs": lfs} if path.endswith((".safetensors", ".bin")) else sibling

    def _resolve(self, repo: str, revision: str, path: str, allowed: bool) -> None:
        if self.hub.statuses and (status := self.hub.statuses.pop(0)) != 200:
            self.refuse(status)
        elif not allowed:
            self.refuse(403, GATED)
        elif path in self.hub.vanished or revision != COMMIT:
            self.refuse(404, "EntryNotFound")
        elif self.hub.elsewhere:
            port = self.server.server_port
            self.answer(302, b"", Location=f"http://localhost:{port}/elsewhere/{repo}/{path}?signature=SECRET")
        else:
            self.send(self.hub.repos[repo][path], path, self.headers.get("Range"))

    def send(self, content: bytes, path: str, asked: str | None) -> None:
        """A file, or its end from the first byte asked for; as much of it as the connection is to last."""
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.hub.ranges else 0
        if asked and start >= len(content):
            self.refuse(416)
            return
        body = bytes(len(content)) if path in self.hub.spoiled else content
        breaks = self.hub.breaks.get(path)
        last = breaks.pop(0) if breaks else None
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(body[start:] if last is None else body[start : start + last])
        if last is not None:
            time.sleep(self.hub.stall)
            self.close_connection = True

    def refuse(self, status: int, code: str | None = None, message: str | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer(status, b'{"error": "no"}', **{name: value for name, value in named.items() if value})

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""
