"""A local stand-in for huggingface.co with one dataset repository: what `HfFileSystem` asks of the Hub's API."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = "somebody/pictures"
COMMIT = hashlib.sha1(b"the only commit").hexdigest()
_REVISION = rf"(?:main|{COMMIT})"


class _Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        api = f"/api/datasets/{REPOSITORY}"
        if re.fullmatch(rf"{api}(/revision/{_REVISION})?", path):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": [], "tags": [], "private": False})
        elif re.fullmatch(rf"{api}/paths-info/{_REVISION}", path):
            wanted = urllib.parse.parse_qs(body.decode()).get("paths", []) if b"=" in body[:20] else []
            wanted = wanted or json.loads(body).get("paths", [])
            wanted = [wanted] if isinstance(wanted, str) else wanted
            self._json([self._entry(name) for name in wanted if (self.folder / name).exists()])
        elif found := re.fullmatch(rf"{api}/tree/{_REVISION}/?(.*)", path):
            if not (self.folder / found[1]).is_dir():
                self._json({"error": "EntryNotFound"}, 404, "EntryNotFound")
                return
            files = sorted((self.folder / found[1]).iterdir())
            self._json([self._entry(file.relative_to(self.folder).as_posix()) for file in files])
        elif found := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/{_REVISION}/(.+)", path):
            self._file(self.folder / found[1])
        else:
            self._json({"error": "not found"}, 404, "RepoNotFound")

    def _entry(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if path.is_dir():
            return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
        content = path.read_bytes()
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._json({"error": "not found"}, 404, "EntryNotFound")
            return
        content, status = path.read_bytes(), 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            content, status = content[first : last + 1], 206
        self._send(content, status, {"X-Repo-Commit": COMMIT})

    def _json(self, value: object, status: int = 200, code: str | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"X-Error-Code": code} if code else {})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving_hub(folder: Path) -> Iterator[str]:
    """The endpoint of a Hub whose repository holds what lies in `folder`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": folder}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
