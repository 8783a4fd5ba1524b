"""Activity of processes and threads as the kernel sees it: bytes read or written, CPU time.

Code that can report its own progress calls `watchdog.enter`, which is cheaper and exact. This module covers the rest:
indexing of data, verification of a checkpoint, a thread that writes one.
"""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

_SOME_BYTES = 65536  # fewer may come from unrelated threads
_SOME_SECONDS = 0.1  # of CPU time


class Traffic:
    """Bytes counted in one of the kernel's tables, for example /proc/self/io: files and pipes, but no sockets."""

    def __init__(self, table: str, *, without: str | None = None) -> None:
        """`without`: a table whose bytes are subtracted, that of the watching thread."""
        self._table, self._without = Path(table), Path(without) if without is not None else None
        self._seen = self._count()

    @property
    def is_counted(self) -> bool:
        """Whether the kernel has this table and it is readable."""
        return self._seen is not None

    def has_moved(self) -> bool:
        """Whether at least 64 KiB have been counted since the last True, or since the beginning."""
        count = self._count()
        moved = count is not None and self._seen is not None and count - self._seen >= _SOME_BYTES
        if moved or count is None:
            self._seen = count
        return moved

    def _count(self) -> int | None:
        try:
            return _bytes_in(self._table) - (_bytes_in(self._without) if self._without is not None else 0)
        except OSError:
            return None


class StartActivity:
    """Activity of a process before its first step: I/O, and CPU time of its main thread."""

    def __init__(self) -> None:
        self._traffic = Traffic("/proc/self/io", without="/proc/thread-self/io")
        self._computed = _main_thread_seconds()
        self.since = time.monotonic()  # of the last activity

    @property
    def is_counted(self) -> bool:
        """Whether activity can be measured here; where not, idleness must not be concluded."""
        return self._traffic.is_counted

    def look(self) -> None:
        """Note whether there was activity since the last call; from the watching thread."""
        computed = _main_thread_seconds()
        if self._traffic.has_moved() or computed - self._computed >= _SOME_SECONDS:
            self._computed, self.since = computed, time.monotonic()


@dataclass
class BackgroundWork:
    """A background thread with I/O, and a description of its task, for example "'save' of step 4"."""

    thread: threading.Thread
    what: str
    since: float = field(default_factory=time.monotonic)  # of the last activity
    _traffic: Traffic = field(init=False)

    def __post_init__(self) -> None:
        self._traffic = Traffic(f"/proc/self/task/{self.thread.native_id}/io")

    def is_stuck(self, patience: float) -> bool:
        """Whether it has had no I/O for `patience` seconds, as far as the kernel can tell."""
        if self._traffic.has_moved():
            self.since = time.monotonic()
        return self.thread.is_alive() and self._traffic.is_counted and time.monotonic() - self.since > patience


def _bytes_in(table: Path) -> int:
    counts = dict(line.split(b": ") for line in table.read_bytes().splitlines())
    return sum(int(counts[name]) for name in (b"rchar", b"wchar", b"read_bytes"))  # the last: reads of mapped files


def _main_thread_seconds() -> float:
    ident = threading.main_thread().ident
    assert ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(ident))
