"""A local http server of a folder, with the faults that networks have."""

import email.utils
import http.server
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FaultyServer(http.server.ThreadingHTTPServer):
    """`faults[name]` are taken one for each GET of a file, until none is left: "cut", "late cut", "stall", "trickle",
    "wrong", "poisoned cut", or a status such as 503; `always[name]` stays. `gets` counts, `sent` in bytes; `ranges`
    says whether parts of files are served.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[str | int]] = {}
        self.always: dict[str, str | int] = {}
        self.gets: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.ranges = True
        self.open_gets = 0
        self.most_open_gets = 0
        self.counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        server = self.server
        with server.counting:
            server.gets[self.path[1:]] += 1
            server.open_gets += 1
            server.most_open_gets = max(server.most_open_gets, server.open_gets)
        try:
            self._answer(with_body=True)
        finally:
            with server.counting:
                server.open_gets -= 1

    def _answer(self, *, with_body: bool) -> None:
        name = self.path[1:]
        path = self.server.folder / name
        queue = self.server.faults.get(name, []) if with_body else []
        fault = queue.pop(0) if queue else self.server.always.get(name)
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        content = path.read_bytes()
        if fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        first = self._first_byte_asked(len(content))
        if fault == "poisoned cut":
            content = bytes([content[0] ^ 1]) + content[1:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            content = content[first:]
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", email.utils.formatdate(path.stat().st_mtime, usegmt=True))
        self.end_headers()
        if not with_body:
            return
        if fault == "cut":
            self._send(content[: len(content) // 2])
            self.close_connection = True
        elif fault in ("late cut", "poisoned cut"):  # so late that the client has taken what came
            self._send(content[: len(content) // 2])
            time.sleep(1)
            self.close_connection = True
        elif fault == "stall":
            self._send(content[:100])
            time.sleep(6)
            self.close_connection = True
        elif fault == "trickle":
            for byte in content[:40]:
                self._send(bytes([byte]))
                time.sleep(0.1)
            self.close_connection = True
        else:
            self._send(content)

    def _first_byte_asked(self, length: int) -> int:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked and self.server.ranges else 0
        return first if first < length else 0

    def _send(self, content: bytes) -> None:
        with self.server.counting:
            self.server.sent[self.path[1:]] += len(content)
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
