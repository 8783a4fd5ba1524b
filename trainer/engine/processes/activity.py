"""What this process is doing, as it reports it to its watchdog: the phase it is in, and threads in the background."""

import faulthandler
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

from trainer.engine.processes.liveness import BackgroundWork
from trainer.engine.processes.peer_status import Progress

Phase = Literal["start", "data", "forward", "backward", "update", "settle", "log", "save", "copy", "validate", "sample"]

_JOIN_SECONDS = 1.0
_GRACE_SECONDS = 13.5  # in which the watchdog's thread asks the store and compares two pulses of the other ranks


@dataclass(frozen=True)
class Patience:
    """Timeouts in seconds without activity: before the first step, during it, and later. 0: none."""

    start: float = 0.0
    first: float = 0.0
    later: float = 0.0

    def at(self, steps: int) -> float:
        """The timeout of a process that has begun `steps` steps."""
        return {0: self.start, 1: self.first}.get(steps, self.later)

    def arm(self, steps: int) -> None:
        """Start faulthandler's timer, a C thread, to end this process: it needs no GIL."""
        if self.at(steps):
            faulthandler.dump_traceback_later(self.at(steps) + _GRACE_SECONDS, exit=True)


@dataclass
class Activity:
    """Progress of this process, the patience of its watchdog (none without one), and background threads with I/O."""

    progress: Progress = field(default_factory=lambda: Progress(since=time.monotonic()))
    patience: Patience = Patience()
    background: list[BackgroundWork] = field(default_factory=list)


OWN = Activity()


def enter(phase: Phase, step: int | None = None) -> None:
    """Report to this process's watchdog that a phase begins, and in which step (default: the same as before).

    At most `train.hang_timeout` may pass between two calls. A call takes less than a microsecond.
    """
    begun = OWN.progress.steps
    OWN.progress = OWN.progress.enter(phase, step)
    if begun != OWN.progress.steps <= 2:  # later steps are covered by the watchdog's regular checks
        OWN.patience.arm(OWN.progress.steps)


def wait_for(thread: threading.Thread, phase: Phase) -> None:
    """Join a thread that writes or uploads: slow I/O is no hang as long as it continues. See `watch_over`."""
    while thread.is_alive():
        enter(phase)
        thread.join(_JOIN_SECONDS)


def watch_over(thread: threading.Thread, phase: Phase) -> None:
    """Watch a started background thread: the run ends where the thread neither moves bytes nor ends for too long."""
    OWN.background[:] = [work for work in OWN.background if work.thread.is_alive()]
    OWN.background.append(BackgroundWork(thread, f"{OWN.progress.enter(phase, None)}, in the background"))
