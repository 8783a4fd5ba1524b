"""Progress of long work: a bar on a terminal, in a log a line every half minute."""

import sys
import threading
import time
from typing import Any, Self

from tqdm import tqdm

LINE_SECONDS = 30.0


class WorkProgress:
    """Progress of `total` pieces of work, of which `done` exist already; a context manager that ends it.

    `what`: the work, for example "sampling"; `unit`: unit of the pieces, for example "img"; `visible` is False in all
    but one of several processes that share the work. Work shorter than `line_seconds` logs no line; with None there are
    no lines at all. `bar`: further options of tqdm.
    """

    def __init__(
        self,
        *,
        total: int,
        what: str,
        unit: str,
        done: int = 0,
        visible: bool = True,
        line_seconds: float | None = LINE_SECONDS,
        **bar: Any,
    ) -> None:
        self.total, self.what, self.unit = total, what, unit
        self._first = self._count = done
        on_terminal = sys.stderr.isatty()
        options = {"unit_scale": True, "leave": False, **bar, "disable": not (visible and on_terminal)}
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True, **options)
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._lines: threading.Thread | None = None
        if visible and not on_terminal and line_seconds is not None:
            # A thread, since a piece may take longer than the interval between lines.
            self._lines = threading.Thread(target=self._tell, args=(line_seconds,), daemon=True)
            self._lines.start()

    def update(self, count: int = 1) -> None:
        """Add finished work."""
        self._count += count
        self._bar.update(count)

    def line(self) -> str:
        """Progress, speed and remaining time: "sampling: 1,200 of 64,000 step (2%), 40.0 step/s, 26:10 left"."""
        finished = self._count - self._first
        rate = finished / max(time.monotonic() - self._began, 1e-9)
        share = f" ({self._count / self.total:.0%})" if self.total else ""
        left = f", {tqdm.format_interval((self.total - self._count) / rate)} left" if finished else ""
        return f"{self.what}: {self._count:,} of {self.total:,} {self.unit}{share}, {rate:.1f} {self.unit}/s{left}"

    def _tell(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            print(self.line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar, or stop logging."""
        self._ended.set()
        if self._lines is not None:
            self._lines.join()
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
