"""Work in a thread beside training, which the watchdog covers."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from trainer.engine.processes.activity import Phase, wait_for, watch_over

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """A function that runs in a thread from now on. `name`: of the thread, for stacks; `phase`: for the watchdog.

    abandonable: the process may end while it runs, and the watchdog does not end the run where it hangs: for transfers
    to servers, which may never answer.
    """

    def __init__(self, action: Callable[[], T], *, name: str, phase: Phase, abandonable: bool = False) -> None:
        self._action = action
        self._phase = phase
        self._results: list[T] = []
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=abandonable)
        self._thread.start()
        if not abandonable:
            watch_over(self._thread, phase)

    @property
    def is_running(self) -> bool:
        """Whether the function has not ended yet."""
        return self._thread.is_alive()

    def result(self) -> T:
        """Wait for the function and return its result, or raise its exception."""
        wait_for(self._thread, self._phase)
        if self._fault is not None:
            raise self._fault
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._action())
        except Exception as fault:  # raised again by `result`, in the training thread
            self._fault = fault
