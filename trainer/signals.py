"""Signals: requests to stop, which set a flag that is read between two network calls, and the death of a parent."""

import ctypes
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopAskedError(Exception):
    """Raised by `StopRequest.check` to leave work that a request to stop interrupts."""


class StopRequest:
    """True once SIGTERM, SIGINT or SIGUSR1 has arrived, here or on another rank; a second SIGINT interrupts at once, as
    users expect.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # that arrived here
        self._told = False

    def install(self) -> None:
        """Take over the stop signals of this process (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def hear(self) -> None:
        """Another rank has been asked to stop."""
        self._told = True

    def check(self) -> None:
        """Raise StopAskedError after a request to stop."""
        if self:
            raise StopAskedError

    def __bool__(self) -> bool:
        return self._told or self.signal is not None


def on_parents_death(number: signal.Signals) -> None:
    """Ask the kernel to send this process `number` when its parent dies; the caller checks that it has not yet."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, number, 0, 0, 0)
