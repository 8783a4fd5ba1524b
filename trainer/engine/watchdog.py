"""A thread in every rank that ends the run where it would wait for ever.

It looks once a second for two things: that another rank has failed or hangs, which the ranks tell each other through
the store, and that this rank, or a thread that works behind its back, has done nothing new for too long. The training
loop only says which phase it enters; before the first step, and of such threads, the kernel tells whether they work.
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
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, TypeVar

import torch.distributed as dist

from trainer.engine import rendezvous
from trainer.engine.liveness import BackgroundWork, StartActivity
from trainer.engine.peers import Ending, Peers, Progress, verdict
from trainer.engine.run import RunFolder
from trainer.errors import TrainerError
from trainer.signals import StopRequest

EXIT_CODE = 3  # of a process that the watchdog ended

T = TypeVar("T")
Phase = Literal["start", "data", "forward", "backward", "update", "settle", "log", "save", "copy", "validate", "sample"]

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 10.0  # for the store
_PULSES_SECONDS = 3.5  # in which every watchdog that lives gives a sign of life
_FIRST_STEP = 4  # times as patient: caches are filled and kernels compiled
_BACKGROUND = 4  # times as patient: one call brings all that was written to the disk
_EXIT_SECONDS = 20.0  # for a process that has failed to be gone
_STORE_SECONDS = 5.0  # that the store is kept for the others to read why the run ends
# How gloo and NCCL say that another process is gone, and that it does not answer.
_COLLECTIVE = re.compile(r"gloo|nccl|c10d", re.IGNORECASE)
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|remote process exited|no route to host", re.IGNORECASE
)
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)


@dataclass(frozen=True)
class Patience:
    """Seconds without a sign of life after which a process hangs: before its first step, in it, and later. 0: never."""

    start: float = 0.0
    first: float = 0.0
    later: float = 0.0

    def at(self, steps: int) -> float:
        """That of a process which has begun so many steps."""
        return {0: self.start, 1: self.first}.get(steps, self.later)

    def arm(self, steps: int) -> None:
        """Have a thread of C's end this process then: nothing in Python does where something keeps its lock."""
        if self.at(steps):
            faulthandler.dump_traceback_later(self.at(steps) + _ANSWER_SECONDS + _PULSES_SECONDS, exit=True)


_progress = Progress(since=time.monotonic())
_patience = Patience()
_background: list[BackgroundWork] = []


def enter(phase: Phase, step: int | None = None) -> None:
    """Tell the watchdog of this process what it does from now on, and in which step (by default the same as before).

    Between two calls no more than `train.hang_timeout` may pass. It costs less than a microsecond.
    """
    global _progress
    begun = _progress.steps
    _progress = _progress.enter(phase, step)
    if begun != _progress.steps <= 2:  # later the watchdog's looks suffice
        _patience.arm(_progress.steps)


def wait_for(thread: threading.Thread, phase: Phase) -> None:
    """Join a thread that writes or copies: however slow the disk or the network, this is no hang. See `watch_over`."""
    while thread.is_alive():
        enter(phase)
        thread.join(_LOOK_SECONDS)


def watch_over(thread: threading.Thread, phase: Phase) -> None:
    """Of a thread that has been started, and moves bytes: the run ends where for long it does not, nor ends."""
    _background[:] = [work for work in _background if work.thread.is_alive()]
    _background.append(BackgroundWork(thread, f"{_progress.enter(phase, None)}, in the background"))


class Watchdog:
    """Watches over what happens in its `with` block on every rank, from the joining of the process group on.

    Without a fault it does nothing. Where this rank raises, the others end within seconds and name it and the reason;
    where a rank hangs, all write their stacks and end. What all ranks raise together (`agreed`) they tell themselves.
    """

    def __init__(self, *, rank: int, world_size: int, hang_timeout: float, timeout: float, stop: StopRequest) -> None:
        """`hang_timeout`, `timeout`: those of the configuration's [train], in seconds."""
        self.folder: RunFolder | None = None  # where stacks and events go, once the run has claimed it
        self._rank, self._world_size = rank, world_size
        self._peers = Peers(rendezvous.own_connection(), rank=rank, world_size=world_size, host=socket.gethostname())
        # Before the first step ranks wait for each other's data and files, for which they have `timeout`.
        start = max(_FIRST_STEP * hang_timeout, timeout) if hang_timeout else 0.0
        self._activity = StartActivity()
        self._patience = Patience(start if self._activity.is_counted else 0.0, _FIRST_STEP * hang_timeout, hang_timeout)
        self._stop = stop
        self._deaf = False  # the store has not answered
        self._closed = threading.Event()
        self._one_end = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        global _progress, _patience
        _progress, _patience = Progress(since=time.monotonic()), self._patience
        _patience.arm(0)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        told_by_all = error is None or (isinstance(error, TrainerError) and error.agreed)
        if error is not None and not told_by_all and self._world_size > 1:
            self._failed(error)
        global _patience
        self._closed.set()
        self._thread.join()
        _patience = Patience()
        faulthandler.cancel_dump_traceback_later()
        self._leave()
        if not told_by_all and self._world_size > 1:
            faulthandler.dump_traceback_later(_EXIT_SECONDS, exit=True)  # the others have ended; nothing may keep this

    def _watch(self) -> None:
        heard = None
        while not self._closed.wait(_LOOK_SECONDS):
            self._activity.look()
            # Where something keeps the interpreter's lock, this thread stands still, but the timer does not.
            self._patience.arm(_progress.steps)
            # A rank that fails as well has a look's time to tell it itself.
            if heard is not None:
                self._end(heard)
            heard = self._ask(self._exchange)
            if heard is None and (self._stuck() or self._is_late()):
                heard = self._announce(Ending("hang", self._rank))
            if heard is not None and heard.kind == "hang":
                self._end(heard)

    def _idle(self) -> float:
        """Seconds without a sign of life."""
        since = _progress.since if _progress.steps else max(_progress.since, self._activity.since)
        return time.monotonic() - since

    def _is_late(self) -> bool:
        """Whether this rank has been idle for too long, and not because it waits for one that works."""
        limit = self._patience.at(_progress.steps)
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
                return False  # the next look hears it, too
            self._activity.look()
        after = self._ask(self._peers.statuses) or {}
        return self._idle() > limit and not self._peers.at_work(before, after, limit)

    def _stuck(self) -> str:
        """What in the background does not get on, or nothing."""
        limit = _BACKGROUND * self._patience.later
        return next((work.what for work in list(_background) if limit and work.is_stuck(limit)), "")

    def _tell(self) -> None:
        self._peers.tell(_progress, idle=self._idle(), stuck=self._stuck())

    def _exchange(self) -> Ending | None:
        self._tell()
        # A launcher may signal one rank alone; the others must not go on drawing for minutes that it waits for.
        if self._peers.stop_requested(here=self._stop.signal is not None):
            self._stop.hear()
        return self._peers.ending()

    def _announce(self, ending: Ending) -> Ending:
        return self._ask(lambda: self._peers.end(ending)) or ending

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The store's answer, or None where there is none, and from then on at once.

        It may never come: a connection to a host that was lost is just silent. So a thread waits that may be left.
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
        """Tell the others, unless they are the reason why this rank fails: then end with them, and do not return."""
        reason = str(error) if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())
        if isinstance(error, RuntimeError) and _COLLECTIVE.search(reason):
            if _LATE.search(reason):
                self._end(self._announce(Ending("hang", self._rank)))
            if _LOST.search(reason):
                self._others_failed(reason, error)
        self._announce(Ending("failed", self._rank, reason))

    def _others_failed(self, reason: str, error: BaseException) -> None:
        """A connection broke: another rank has said why, or a launcher ends this one too, or one is silent."""
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
            silent = [0]  # with the store that it held, or on the host that did
        if silent:
            gone = f"it is gone (killed, or its host is lost): {reason}"
            self._end(self._announce(Ending("failed", silent[0], gone)))

    def _end(self, ending: Ending) -> None:
        """End this process, in the thread that comes first; the other one waits for that."""
        self._one_end.acquire()
        faulthandler.dump_traceback_later(_EXIT_SECONDS, exit=True)  # should this hang, too
        if ending.kind == "hang":
            self._write_stacks()
            self._conclude() if ending.rank == self._rank else self._await_conclusion()
        else:
            self._say(f"rank {ending.rank} failed: {ending.reason}; this rank ({self._rank}) ends with it")
            if self.folder is not None:
                self.folder.event("rank_failed", step=_progress.step, rank=ending.rank, reason=ending.reason)
        self._leave()
        for loader in multiprocessing.active_children():
            loader.kill()
        os._exit(EXIT_CODE)

    def _write_stacks(self) -> None:
        seconds = time.monotonic() - _progress.since
        title = f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}: {_progress} for {seconds:.0f} s"
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame))
            for ident, frame in sorted(
                sys._current_frames().items(), key=lambda item: names.get(item[0]) != "MainThread"
            )
        ]
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n" + "".join(stacks)
        self._say(text)
        if self.folder is not None:
            with suppress(OSError):
                path = self.folder.path / "hangs" / f"rank-{self._rank:05d}.txt"
                path.parent.mkdir(exist_ok=True)
                with path.open("a") as file:
                    file.write(text + "\n")

    def _conclude(self) -> None:
        """Find out which ranks hang, tell it, and let the others end."""
        line = self._ask(self._survey)
        if line is None:
            line = f"rank {self._rank} waits in {_progress}, and the store is silent: rank 0 or its host is lost"
        where = f"above and in {self.folder.path / 'hangs'}" if self.folder is not None else "above"
        self._say(f"{line}; the run ends, stacks are {where}")
        if self.folder is not None:
            self.folder.event_here(self._rank, "hang", step=_progress.step, verdict=line)
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
        """The process that holds the store waits a little for the others to have read it."""
        self._ask(self._peers.leave)
        deadline = time.monotonic() + _STORE_SECONDS
        while rendezvous.hosts_store() and not self._deaf and time.monotonic() < deadline:
            if self._ask(self._peers.all_left):
                return
            time.sleep(_LOOK_SECONDS / 20)

    @staticmethod
    def _say(text: str) -> None:
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())  # sys.stderr may be locked by the thread that hangs
