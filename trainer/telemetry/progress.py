"""Progress on the terminal."""

import contextlib
import time
from collections.abc import Callable

from data_prep.progress import WorkProgress


class Progress(WorkProgress):
    """A bar with rate and ETA on a terminal, occasional lines in a log file, nothing on other ranks."""

    def __init__(self, *, total: int, done: int, unit: str, title: str, visible: bool) -> None:
        bar = {"unit_scale": False, "leave": True}
        super().__init__(total=total, what=title, unit=unit, done=done, visible=visible, line_seconds=None, **bar)
        self._visible = visible
        self._print: Callable[[str], object] = print_line if self._bar.disable else self._bar.write

    def show(self, text: str) -> None:
        """Set the figures shown after the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def say(self, line: str) -> None:
        """Print a line above the bar, or into the log."""
        if self._visible:
            with contextlib.suppress(OSError):
                self._print(line)

    def log(self, line: str) -> None:
        """Print a line only where there is no bar, which shows the same."""
        if self._visible and self._bar.disable:
            print_line(line)


class Stopwatch:
    """Measures training time; paused activities (sampling, saving) are excluded.

    `on_change` is called with the activity that begins: the reason of a pause, and "training" after it.
    """

    def __init__(self, on_change: Callable[[str], object] = lambda _: None) -> None:
        self.spent: dict[str, float] = {}  # seconds of pauses by reason
        self._on_change = on_change
        self._started = self._counted = time.perf_counter()
        self._images = 0

    def count(self, images: int) -> None:
        """Add images that have been trained on up to now."""
        self._counted = time.perf_counter()
        self._images += images

    def pause(self, reason: str) -> Callable[[], None]:
        """Pause the measurement; call the result to continue."""
        paused = time.perf_counter()
        self._on_change(reason)

        def resume() -> None:
            seconds = time.perf_counter() - paused
            self.spent[reason] = self.spent.get(reason, 0.0) + seconds
            self._started += seconds
            self._counted += seconds
            self._on_change("training")

        return resume

    def lap(self) -> tuple[int, float]:
        """Images trained on since the last lap, and the seconds that they took, without pauses; the next lap starts at
        the last `count`.
        """
        lap = self._images, max(self._counted - self._started, 1e-9)
        self._started, self._images = self._counted, 0
        return lap


def print_line(line: str) -> None:
    """Print to the standard output. Failures (a full disk, a closed pipe) are ignored; characters that its encoding
    lacks are escaped.
    """
    with contextlib.suppress(OSError):
        try:
            print(line, flush=True)
        except UnicodeEncodeError:
            print(line.encode("ascii", "backslashreplace").decode(), flush=True)
