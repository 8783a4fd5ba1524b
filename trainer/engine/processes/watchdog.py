"""A watchdog thread in every rank, which ends the run where it would otherwise hang forever.

Once a second it checks two things: whether another rank has failed or hangs, which the ranks publish in the store, and
whether this rank or one of its background threads has made no progress for too long. The training loop reports each
phase (activity.py). Before the first step, and for background threads, activity is measured by the kernel's counters.
"""

import faulthandler
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

import torch.distributed as dist

from trainer.engine.processes import rendezvous
from trainer.engine.processes.activity import OWN, Patience
from trainer.engine.processes.liveness import StartActivity
from trainer.engine.processes.peer_status import Ending, Peers, Progress, verdict
from trainer.engine.run_folder import RunFolder
from trainer.errors import TrainerError
from trainer.signals import StopRequest

EXIT_CODE = 3  # of a process ended by the watchdog

T = TypeVar("T")

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 10.0  # timeout of the store
_PULSES_SECONDS = 3.5  # every live watchdog increases its pulse within this time
_FIRST_STEP = 4  # factor of the timeout: caches are filled and kernels compiled
_BACKGROUND = 4  # factor of the timeout: one fsync may write everything to the disk
_EXIT_SECONDS = 20.0  # after which a failed process is killed
_STORE_SECONDS = 5.0  # that the store is kept up for others to read why the run ends
# Messages of gloo and NCCL for a peer that exited, and for a timeout.
_COLLECTIVE = re.compile(r"gloo|nccl|c10d", re.IGNORECASE)
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|remote process exited|no route to host", re.IGNORECASE
)
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)


class Watchdog:
    """Watches its `with` block on every rank, once the process group is joined.

    Without a fault it does nothing. Where this rank raises, the others end within seconds, with its number and the
    reason; where a rank hangs, all write their stacks and end. Errors raised by all ranks together (`agreed`) are not
    published.
    """

    def __init__(self, *, rank: int, world_size: int, hang_timeout: float, timeout: float, stop: StopRequest) -> None:
        """`hang_timeout`, `timeout`: of the configuration's [train], in seconds."""
        self.folder: RunFolder | None = None  # for stacks and events, set once the run has claimed it
        self._rank, self._world_size = rank, world_size
        self._peers = Peers(rendezvous.own_connection(), rank=rank, world_size=world_size, host=socket.gethostname())
        # Before the first step ranks wait for each other's data and files, with `timeout`.
        start = max(_FIRST_STEP * hang_timeout, timeout) if hang_timeout else 0.0
        self._activity = StartActivity()
        self._patience = Patience(start if self._activity.is_counted else 0.0, _FIRST_STEP * hang_timeout, hang_timeout)
        self._stop = stop
        self._deaf = False  # the store did not answer; it is not called again
        self._closed = threading.Event()
        self._one_end = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        OWN.progress, OWN.patience = Progress(since=time.monotonic()), self._patience
        OWN.patience.arm(0)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        told_by_all = error is None or (isinstance(error, TrainerError) and error.agreed)
        if error is not None and not told_by_all and self._world_size > 1:
            self._failed(error)
        self._closed.set()
        self._thread.join()
        OWN.patience = Patience()
        faulthandler.cancel_dump_traceback_later()
        self._leave()
        if not told_by_all and self._world_size > 1:
            faulthandler.dump_traceback_later(_EXIT_SECONDS, exit=True)  # the other ranks have ended

    def _watch(self) -> None:
        heard = None
        while not self._closed.wait(_LOOK_SECONDS):
            self._activity.look()
            # While another thread holds the GIL this thread cannot run, but faulthandler's timer fires.
            self._patience.arm(OWN.progress.steps)
            # A rank that fails too has one interval to report it itself.
            if heard is not None:
                self._end(heard)
            heard = self._ask(self._exchange)
            if heard is None and (self._stuck() or self._is_late()):
                heard = self._announce(Ending("hang", self._rank))
            if heard is not None and heard.kind == "hang":
                self._end(heard)

    def _idle(self) -> float:
        """Seconds without activity."""
        since = OWN.progress.since if OWN.progress.steps else max(OWN.progress.since, self._activity.since)
        return time.monotonic() - since

    def _is_late(self) -> bool:
        """Whether this rank has been idle for too long without waiting for an active rank."""
        limit = self._patience.at(OWN.progress.steps)
        if not limit or self._idle() <= limit:
            return False
        if self._world_size == 1:
            return True
        before = self._ask(self._peers.statuses) or {}
        deadline = time.monotonic() + _PULSES_SECONDS
        while time.monotonic() < deadline:
            if self._closed.wait(_LOOK_SECONDS):
                return False
            if self._ask(self._exchange) is not None:
                return False  # checked again at the next interval
            self._activity.look()
        after = self._ask(self._peers.statuses) or {}
        return self._idle() > limit and not self._peers.at_work(before, after, limit)

    def _stuck(self) -> str:
        """A background task that makes no progress, or ""."""
        limit = _BACKGROUND * self._patience.later
        return next((work.what for work in list(OWN.background) if limit and work.is_stuck(limit)), "")

    def _tell(self) -> None:
        self._peers.tell(OWN.progress, idle=self._idle(), stuck=self._stuck())

    def _exchange(self) -> Ending | None:
        self._tell()
        # A launcher may signal one rank only; the others must not continue a sampling of minutes.
        if self._peers.stop_requested(here=self._stop.signal is not None):
            self._stop.hear()
        return self._peers.ending()

    def _announce(self, ending: Ending) -> Ending:
        return self._ask(lambda: self._peers.end(ending)) or ending

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The store's answer, or None where it does not answer; after that, None at once.

        The call runs in a thread that can be abandoned: over a lost connection it may block forever.
        """
        if self._deaf:
            return None
        answers: list[T] = []

        def ask() -> None:
            with suppress(dist.DistError):
                answers.append(question())

        thread = threading.Thread(target=ask, name="watchdog asks", daemon=True)
        thread.start()
        thread.join(_ANSWER_SECONDS)
        self._deaf = not answers
        return answers[0] if answers else None

    def _failed(self, error: BaseException) -> None:
        """Publish the error. Where another rank's failure caused it, end with the others instead; does not return
        then.
        """
        reason = str(error) if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())
        if isinstance(error, RuntimeError) and _COLLECTIVE.search(reason):
            if _LATE.search(reason):
                self._end(self._announce(Ending("hang", self._rank)))
            if _LOST.search(reason):
                self._others_failed(reason, error)
        self._announce(Ending("failed", self._rank, reason))

    def _others_failed(self, reason: str, error: BaseException) -> None:
        """A connection broke: wait for another rank's reason, or a launcher's signal, or find the silent rank."""
        before = self._ask(self._peers.statuses) or {}
        deadline = time.monotonic() + _PULSES_SECONDS
        while time.monotonic() < deadline:
            ending = self._ask(self._peers.ending)
            if ending is not None:
                self._end(ending)
            if self._stop.signal is not None:
                raise TrainerError(f"rank {self._rank} ends with another that is gone ({reason})") from error
            time.sleep(_PULSES_SECONDS / 50)
        silent = self._peers.silent(before, self._ask(self._peers.statuses) or {})
        if self._deaf:
            silent = [0]  # rank 0 hosts the store, or is on the host that does
        if silent:
            gone = f"it is gone (killed, or its host is lost): {reason}"
            self._end(self._announce(Ending("failed", silent[0], gone)))

    def _end(self, ending: Ending) -> None:
        """End this process, from whichever thread calls first; the other thread waits for the exit."""
        self._one_end.acquire()
        faulthandler.dump_traceback_later(_EXIT_SECONDS, exit=True)  # in case this hangs too
        if ending.kind == "hang":
            self._write_stacks()
            self._conclude() if ending.rank == self._rank else self._await_conclusion()
        else:
            self._say(f"rank {ending.rank} failed: {ending.reason}; this rank ({self._rank}) ends with it")
            if self.folder is not None:
                self.folder.event("rank_failed", step=OWN.progress.step, rank=ending.rank, reason=ending.reason)
        self._leave()
        for loader in multiprocessing.active_children():
            loader.kill()
        os._exit(EXIT_CODE)

    def _write_stacks(self) -> None:
        seconds = time.monotonic() - OWN.progress.since
        whose = f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}"
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame))
            for ident, frame in sorted(
                sys._current_frames().items(), key=lambda item: names.get(item[0]) != "MainThread"
            )
        ]
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {whose}: {OWN.progress} for {seconds:.0f} s\n" + "".join(stacks)
        self._say(text)
        if self.folder is not None:
            with suppress(OSError):
                path = self.folder.path / "hangs" / f"rank-{self._rank:05d}.txt"
                path.parent.mkdir(exist_ok=True)
                with path.open("a") as file:
                    file.write(text + "\n")

    def _conclude(self) -> None:
        """Find the ranks that hang, report them, and let the others end."""
        line = self._ask(self._survey)
        if line is None:
            line = f"rank {self._rank} waits in {OWN.progress}, and the store is silent: rank 0 or its host is lost"
        where = f"above and in {self.folder.path / 'hangs'}" if self.folder is not None else "above"
        self._say(f"{line}; the run ends, stacks are {where}")
        if self.folder is not None:
            self.folder.event_here(self._rank, "hang", step=OWN.progress.step, verdict=line)
        self._ask(self._peers.conclude)

    def _survey(self) -> str:
        looks = []
        for pause in (0, _PULSES_SECONDS):
            time.sleep(pause)
            self._tell()
            looks.append(self._peers.statuses())
        return verdict(looks[-1], self._peers.silent(*looks), self._world_size)

    def _await_conclusion(self) -> None:
        deadline = time.monotonic() + 3 * _PULSES_SECONDS
        while not self._ask(self._peers.concluded) and not self._deaf and time.monotonic() < deadline:
            self._ask(self._exchange)
            time.sleep(_LOOK_SECONDS / 2)

    def _leave(self) -> None:
        """The process that hosts the store waits a little until the others have read it."""
        self._ask(self._peers.leave)
        deadline = time.monotonic() + _STORE_SECONDS
        while rendezvous.hosts_store() and not self._deaf and time.monotonic() < deadline:
            if self._ask(self._peers.all_left):
                return
            time.sleep(_LOOK_SECONDS / 20)

    @staticmethod
    def _say(text: str) -> None:
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())  # sys.stderr's lock may be held by the hanging thread
