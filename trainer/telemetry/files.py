"""Files that tell of a run: read whatever their bytes are, written so that no reader sees half, and never the end of
a run.

What cannot be read is left out. What cannot be written is told in one line, kept, and written when it can be.
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

_MOST_PENDING = 2**24  # bytes that are kept while they cannot be written
_TOO_LARGE = 2**63  # integers from here on are no counts of anything


class BestEffort:
    """Around writes that only tell of a run: the first fault of each file is told, and that it can be written again."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._failing: set[str] = set()

    @contextmanager
    def writing(self, what: Path | str) -> Iterator[None]:
        """An OSError, or a text that has no bytes, is told once; `what` names the file."""
        name = str(what)
        try:
            yield
        except (OSError, UnicodeError) as fault:
            if name not in self._failing:
                self._failing.add(name)
                self.say(f"{name}: cannot be written ({words(fault)}); the run goes on without, and tries again")
        else:
            if name in self._failing:
                self._failing.discard(name)
                self.say(f"{name}: is written again")


def words(fault: Exception) -> str:
    """What the system says, without the path, which the line names anyway."""
    return fault.strerror or str(fault) if isinstance(fault, OSError) else str(fault)


def read_bytes(path: Path) -> bytes:
    """All bytes of a regular file. Raises OSError, also for what is none: a pipe would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return path.read_bytes()


def parse_object(line: bytes) -> dict[str, Any] | None:
    """A JSON object, or None where the bytes are none. NUL bytes around it, as a power failure leaves, do not count."""
    try:
        content = json.loads(line.strip(b"\0 \t\r\n").decode("utf-8-sig"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number or a nesting without end
        return None
    return content if isinstance(content, dict) else None


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds, or None where it cannot be read or holds none."""
    try:
        return parse_object(read_bytes(path))
    except OSError:
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that has one a line; lines that are none, or a file that is none, are left out."""
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError:
        return []
    return [record for line in lines if (record := parse_object(line)) is not None]


def number(value: Any) -> float | None:
    """A number as one reads it from JSON, NaN and infinities too; None for what is none, or too large to be meant."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if isinstance(value, int) and abs(value) >= _TOO_LARGE else value


def count(value: Any) -> int | None:
    """A whole number of things, 0 or more; None for what is none."""
    found = number(value)
    return int(found) if found is not None and math.isfinite(found) and found >= 0 and found == int(found) else None


def numbers(value: Any) -> dict[str, float]:
    """Of a table those values that are finite numbers."""
    found = {name: number(one) for name, one in value.items()} if isinstance(value, Mapping) else {}
    return {name: one for name, one in found.items() if one is not None and math.isfinite(one)}


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """The file appears whole or not at all; if `durable`, it is on disk then. Raises OSError, or UnicodeError."""
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
    """A file that grows at its end by whole pieces: of one that does not fit nothing stays.

    A piece that cannot be written is kept and written before the next one; of very many the newest. `lines`: a piece is
    a line, and one that was cut by a kill is ended before the next.
    """

    def __init__(self, path: Path, *, lines: bool = True) -> None:
        self.path = path
        self._lines = lines
        self._pending: deque[bytes] = deque()
        self._end = 0  # of the file, after what was written last
        self._last = b""

    def append(self, piece: bytes) -> None:
        """Write at the end. Raises OSError; the piece is kept."""
        self._pending.append(piece)
        while len(self._pending) > 1 and sum(map(len, self._pending)) > _MOST_PENDING:
            self._pending.popleft()
        self._write()

    def append_json(self, record: Mapping[str, Any]) -> None:
        """The same of a line with a JSON object."""
        self.append(_line(record))

    def replace_last_json(self, record: Mapping[str, Any]) -> None:
        """Write a record instead of the one that was appended last; beside it, where the file has changed since."""
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
                if os.fstat(descriptor).st_size == begin + written:  # nobody else has written since
                    os.ftruncate(descriptor, begin)
                raise
        self._last, self._end = self._pending[-1], begin + len(content)
        self._pending.clear()

    @contextmanager
    def _opened(self) -> Iterator[int]:
        # Not O_WRONLY, by which a named pipe without a reader would be waited for.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "is no regular file", str(self.path))
            yield descriptor
        finally:
            os.close(descriptor)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
