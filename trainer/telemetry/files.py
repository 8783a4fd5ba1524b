"""Informative files of a run: robust readers, atomic writers, and errors that do not end the run.

Unreadable content is left out. A failed write is reported in one line, kept in memory and repeated later.
"""

import contextlib
import errno
import json
import math
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MOST_PENDING = 2**24  # bytes kept in memory while they cannot be written
_TOO_LARGE = 2**63  # larger integers are not accepted as counts


class BestEffort:
    """Wraps informative writes: reports the first failure of each file, and the first success after it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._failing: set[str] = set()

    @contextmanager
    def writing(self, what: Path | str) -> Iterator[None]:
        """A context that reports an OSError or a UnicodeError once; `what` is the file, for the message."""
        name = str(what)
        try:
            yield
        except (OSError, UnicodeError) as fault:
            if name not in self._failing:
                self._failing.add(name)
                reason = getattr(fault, "strerror", None) or fault  # without the path, which the line has already
                self.say(f"{name}: cannot be written ({reason}); the run goes on without, and tries again")
        else:
            if name in self._failing:
                self._failing.discard(name)
                self.say(f"{name}: is written again")


def read_bytes(path: Path) -> bytes:
    """All bytes of a regular file. Raises OSError, also for other files: a pipe may have no end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return path.read_bytes()


def parse_object(line: bytes) -> dict[str, Any] | None:
    """A JSON object; None where the bytes are none. Surrounding NUL bytes, as a power failure may leave, are
    ignored.
    """
    try:
        content = json.loads(line.strip(b"\0 \t\r\n").decode("utf-8-sig"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or numbers or nesting beyond the limits
        return None
    return content if isinstance(content, dict) else None


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where it cannot be read or parsed."""
    try:
        return parse_object(read_bytes(path))
    except OSError:
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file with one a line; invalid lines are left out, and so is an unreadable file."""
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError:
        return []
    return [record for line in lines if (record := parse_object(line)) is not None]


def number(value: Any) -> float | None:
    """A number from JSON, including NaN and infinities; None for other values and integers that are too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if isinstance(value, int) and abs(value) >= _TOO_LARGE else value


def count(value: Any) -> int | None:
    """A non-negative integer from JSON; None for other values."""
    found = number(value)
    return int(found) if found is not None and math.isfinite(found) and found >= 0 and found == int(found) else None


def numbers(value: Any) -> dict[str, float]:
    """The entries of a table whose values are finite numbers."""
    found = {name: number(one) for name, one in value.items()} if isinstance(value, Mapping) else {}
    return {name: one for name, one in found.items() if one is not None and math.isfinite(one)}


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file atomically; if `durable`, it is synced to disk. Raises OSError, or UnicodeError."""
    fresh = path.with_name(f"{path.name}.tmp")
    try:
        with fresh.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


class AppendedFile:
    """A file that is appended to in whole pieces: after a failed write no part of the piece remains.

    A piece that cannot be written is kept and written before the next one; beyond a limit the oldest are dropped.
    `lines`: a piece is a line; an incomplete last line, left by a kill, is terminated before the next.
    """

    def __init__(self, path: Path, *, lines: bool = True) -> None:
        self.path = path
        self._lines = lines
        self._pending: deque[bytes] = deque()
        self._end = 0  # size of the file after the last write
        self._last = b""

    def append(self, piece: bytes) -> None:
        """Append a piece. Raises OSError; the piece is kept for the next call."""
        self._pending.append(piece)
        while len(self._pending) > 1 and sum(map(len, self._pending)) > _MOST_PENDING:
            self._pending.popleft()
        self._write()

    def append_json(self, record: Mapping[str, Any]) -> None:
        """Append a line with a JSON object; errors as `append`."""
        self.append(json.dumps(record).encode() + b"\n")

    def replace_last_json(self, record: Mapping[str, Any]) -> None:
        """Replace the record that was appended last; if the file has changed since, append instead."""
        if self._pending:
            self._pending.pop()
        else:
            with self._opened() as descriptor:
                if os.fstat(descriptor).st_size == self._end:
                    os.ftruncate(descriptor, self._end - len(self._last))
        self.append_json(record)

    def _write(self) -> None:
        with self._opened() as descriptor:
            begin = os.fstat(descriptor).st_size
            content = b"".join(self._pending)
            if self._lines and begin and os.pread(descriptor, 1, begin - 1) != b"\n":
                content = b"\n" + content
            written = 0
            try:
                while written < len(content):
                    written += os.write(descriptor, content[written:])
            except OSError:
                if os.fstat(descriptor).st_size == begin + written:  # no other process has appended meanwhile
                    os.ftruncate(descriptor, begin)
                raise
        self._last, self._end = self._pending[-1], begin + len(content)
        self._pending.clear()

    @contextmanager
    def _opened(self) -> Iterator[int]:
        # Not O_WRONLY, which would block on a named pipe without a reader.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "is no regular file", str(self.path))
            yield descriptor
        finally:
            os.close(descriptor)
