"""A model hub on a loopback port, as far as huggingface_hub's client asks it: revisions, listings, files by ranges."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """`tiny/open` is served; `tiny/gated` and `tiny/broken` are refused and fail; there is nothing else."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    asked: list[str]
    keys: set[str]

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """The same without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """A revision, a listing or a file."""
        path = self.path.split("?")[0].removeprefix("/api/models").lstrip("/")
        self.asked.append(path)
        self.keys.add(self.headers.get("Authorization", ""))
        owner, name, *rest = path.split("/")
        if name == "gated":
            self.answer(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif name == "broken":
            self.answer(500, b"{}", {})
        elif (owner, name) != ("tiny", "open"):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif rest[0] == "revision":
            self.answer(200, json.dumps({"id": "tiny/open", "sha": COMMIT, "siblings": []}).encode(), {})
        elif rest[0] == "tree":
            listing = [
                {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                for k, v in self.files.items()
            ]
            self.answer(200, json.dumps(listing).encode(), {})
        else:
            self.file(self.files["/".join(rest[2:])])

    def file(self, body: bytes) -> None:
        """A file, or the range of it that is asked for."""
        told = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            told["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(206, body[start:], told)
        else:
            self.answer(200, body, told)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """One reply."""
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[tuple[str, type[Hub]]]:
    """The address of a hub whose `tiny/open` holds a directory's files; and what it was asked."""
    files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    hub = type("Served", (Hub,), {"files": files, "asked": [], "keys": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
