"""A Hugging Face Hub on loopback that speaks the real one's HTTP to an unmodified huggingface_hub.

    with Hub() as hub:
        commit = hub.push("org/name", {"config.json": b"{}", "model.safetensors": safetensors(1000)})
        hub.fault("model.safetensors", cut=500, times=2)
        ...  # HF_ENDPOINT=hub.url
        assert hub.got("model.safetensors") == 3

Large files redirect to another host name, as the real hub's do to its content network; Xet is never
announced, so that plain HTTP is spoken.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".ot", ".gguf")


def safetensors(size: int, seed: int = 0) -> bytes:
    """A file of the safetensors format with one uint8 tensor of `size` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    block = hashlib.sha256(str(seed).encode()).digest()
    return len(header).to_bytes(8, "little") + header + (block * (size // 32 + 1))[:size]


Files = dict[str, bytes]


class Hub:
    """A server on a thread. Faults and counts match by a part of "GET /path"."""

    def __init__(self) -> None:
        # name -> {"commits": {sha: Files}, "branches": {}, "access": {}}
        self.models: dict[str, dict[str, Any]] = {}
        self.content: dict[str, tuple[str, bytes]] = {}  # sha256 -> path, bytes
        self.faults: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []
        self.mutex = threading.Lock()

    def __enter__(self) -> Hub:
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(self, name: str, files: Files, *, branch: str = "main", **access: str) -> str:
        """A commit on a branch. access: `gated` or `private`, each the token that opens the model."""
        model = self.models.setdefault(name, {"commits": {}, "branches": {}})
        parts = [f"{path} {oid(data)}" for path, data in sorted(files.items())]
        commit = hashlib.sha1("\n".join([name, branch, *parts]).encode()).hexdigest()
        model["commits"][commit] = dict(files)
        model["branches"][branch] = commit
        model["access"] = access
        self.content |= {hashlib.sha256(data).hexdigest(): (path, data) for path, data in files.items()}
        return commit

    def fault(self, part: str, *, times: int = 1 << 30, **what: float) -> None:
        """For the next `times` requests: status=503 (with retry_after=<seconds>), cut=<bytes sent
        before the connection breaks>, rate=<bytes per second>, hold=<bytes sent before `go_on`>."""
        self.faults.append({"part": part, "times": times, "what": what})

    def go_on(self) -> None:
        """No more faults; what was held goes on."""
        self.faults.clear()

    def mend(self) -> None:
        """No more faults, and the counts begin anew."""
        self.faults.clear()
        self.seen.clear()

    def requests(self) -> list[dict[str, Any]]:
        """Every request so far: line ("GET /path"), token, sent (bytes of a file), file."""
        return list(self.seen)

    def got(self, file: str) -> int:
        """How often the contents of a file were asked for."""
        return sum(request["file"] == file for request in self.requests())


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs(path: str, data: bytes) -> dict[str, Any] | None:
    if not path.endswith(LARGE):
        return None
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}


class Refused(Exception):
    def __init__(
        self, status: int, code: str = "", message: str = "", retry_after: float | None = None
    ) -> None:
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        line = f"{self.command} {unquote(self.path)}"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        record = {"line": line, "token": token, "sent": 0, "file": None}
        with self.hub.mutex:
            self.hub.seen.append(record)
            what: dict[str, float] = {}
            for fault in self.hub.faults:
                if fault["part"] in line and fault["times"] > 0:
                    fault["times"] -= 1
                    what |= fault["what"]
        try:
            if "status" in what:
                raise Refused(int(what["status"]), retry_after=what.get("retry_after"))
            self.route(record, what)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            if refused.retry_after is not None:
                headers["Retry-After"] = f"{refused.retry_after:g}"
            self.answer(refused.status, b"{}", {k: v for k, v in headers.items() if v})

    def route(self, record: dict[str, Any], what: dict[str, float]) -> None:
        url = urlsplit(self.path)
        path = url.path.strip("/").split("/")
        if path[0] == "cdn":
            name, data = self.hub.content[path[1]]
            self.file(record, name, data, what)
        elif path[:2] == ["api", "models"]:
            at = next((i for i, part in enumerate(path) if part in ("revision", "tree")), len(path))
            kind, revision = (path[at], unquote(path[at + 1])) if at < len(path) else ("revision", "main")
            name = "/".join(path[2:at])
            commit, files = self.find(name, revision)
            body = self.tree(files) if kind == "tree" else self.info(name, commit, files, url.query)
            self.answer(200, json.dumps(body).encode())
        elif "resolve" in path:
            at = path.index("resolve")
            commit, files = self.find("/".join(path[:at]), unquote(path[at + 1]), contents=True)
            name = unquote("/".join(path[at + 2 :]))
            if name not in files:
                raise Refused(404, "EntryNotFound", "Entry not found")
            self.resolve(record, commit, name, files[name], what)
        else:
            raise Refused(404)

    def find(self, name: str, revision: str, *, contents: bool = False) -> tuple[str, Files]:
        """A commit as the token may see it: a gated model without its contents, a private one not at all."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token.startswith("expired"):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        model = self.hub.models.get(name)
        if model is None or model["access"].get("private", token) != token:
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if contents and model["access"].get("gated", token) != token:
            raise Refused(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        commit = model["branches"].get(revision, revision)
        if commit not in model["commits"]:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, model["commits"][commit]

    def info(self, name: str, commit: str, files: Files, query: str) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        if "blobs" in parse_qs(query):
            for sibling in siblings:
                path = sibling["rfilename"]
                sibling |= {"size": len(files[path]), "blobId": oid(files[path])}
                if large := lfs(path, files[path]):
                    sibling["lfs"] = {"sha256": large.pop("oid"), **large}
        return {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": False,
            "tags": [],
            "siblings": siblings,
        }

    def tree(self, files: Files) -> list[dict[str, Any]]:
        entries = []
        for path, data in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": oid(data)}
            entries.append({**entry, "lfs": large} if (large := lfs(path, data)) else entry)
        return entries

    def resolve(
        self, record: dict[str, Any], commit: str, path: str, data: bytes, what: dict[str, float]
    ) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid(data)}"'}
        large = lfs(path, data)
        if large is None:
            self.file(record, path, data, what, headers)
            return
        sha = large["oid"]
        port = self.server.server_address[1]
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha}"', "ETag": f'"{commit}"'}
        headers["Location"] = f"http://localhost:{port}/cdn/{sha}/{path}?Signature=signed"
        self.answer(302, b"", headers)

    def file(
        self,
        record: dict[str, Any],
        path: str,
        data: bytes,
        what: dict[str, float],
        headers: dict[str, str] | None = None,
    ) -> None:
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        status, first = 200, 0
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            record["file"] = path
        self.answer(status, data[first:], headers, record, what)

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        record: dict[str, Any] | None = None,
        what: dict[str, float] | None = None,
    ) -> None:
        what = what or {}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = len(body)
        body = body[: int(what.get("cut", whole))]
        rate = what.get("rate")
        step = max(1, int(rate / 50)) if rate else int(what.get("hold", len(body))) or 1
        try:
            for at in range(0, len(body), step):
                self.wfile.write(body[at : at + step])
                if record:
                    record["sent"] += len(body[at : at + step])
                if rate:
                    time.sleep(step / rate)
                while at + step >= what.get("hold", whole + step) and self.hub.faults:
                    time.sleep(0.01)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if len(body) < whole:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients of these tests are killed
            super().handle_error(request, client_address)
