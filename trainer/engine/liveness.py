"""Whether something still works, seen from outside: bytes that the kernel counts as read or written.

For what says by itself how far it is, `watchdog.enter` is cheaper and exact; this is for the rest: data that is
indexed, a checkpoint that is verified, a thread that writes one.
"""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

_SOME_BYTES = 65536  # less may be other threads' small talk
_SOME_SECONDS = 0.1  # of computing


class Traffic:
    """Bytes through one of the kernel's tables, as /proc/self/io: those of files and pipes, not those of sockets."""

    def __init__(self, table: str, *, without: str | None = None) -> None:
        """`without`: a table of what is not to be counted, of the watching thread itself."""
        self._table, self._without = Path(table), Path(without) if without is not None else None
        self._seen = self._count()

    @property
    def is_counted(self) -> bool:
        """Whether the kernel keeps this table, and it can still be read."""
        return self._seen is not None

    def has_moved(self) -> bool:
        """Whether a good deal has come since the last True, or since the beginning."""
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
    """Signs of life of a process before its first step: bytes that it moves, and what its main thread computes."""

    def __init__(self) -> None:
        self._traffic = Traffic("/proc/self/io", without="/proc/thread-self/io")
        self._computed = _main_thread_seconds()
        self.since = time.monotonic()  # the last sign

    @property
    def is_counted(self) -> bool:
        """Whether this can be known here; where it cannot, silence means nothing."""
        return self._traffic.is_counted

    def look(self) -> None:
        """Note whether there has been a sign since the last look; from the watching thread."""
        computed = _main_thread_seconds()
        if self._traffic.has_moved() or computed - self._computed >= _SOME_SECONDS:
            self._computed, self.since = computed, time.monotonic()


@dataclass
class BackgroundWork:
    """A thread that moves bytes while training goes on, and what it does: "'save' of step 4"."""

    thread: threading.Thread
    what: str
    since: float = field(default_factory=time.monotonic)  # the last sign of life
    _traffic: Traffic = field(init=False)

    def __post_init__(self) -> None:
        self._traffic = Traffic(f"/proc/self/task/{self.thread.native_id}/io")

    def is_stuck(self, patience: float) -> bool:
        """Whether it has moved nothing for so many seconds, as far as the kernel tells."""
        if self._traffic.has_moved():
            self.since = time.monotonic()
        return self.thread.is_alive() and self._traffic.is_counted and time.monotonic() - self.since > patience


def _bytes_in(table: Path) -> int:
    counts = dict(line.split(b": ") for line in table.read_bytes().splitlines())
    return sum(int(counts[name]) for name in (b"rchar", b"wchar", b"read_bytes"))  # the last: what is mapped


def _main_thread_seconds() -> float:
    ident = threading.main_thread().ident
    assert ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(ident))
