"""A thread in every rank that ends the run where it would wait for ever.

It looks once a second for two things: that another rank has failed or hangs, which the ranks tell each other through
the store, and that this rank has done nothing new for too long. The training loop only says which phase it enters.
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
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

import torch.distributed as dist

from trainer.engine import rendezvous
from trainer.engine.peers import Ending, Peers, Progress, verdict
from trainer.engine.run import RunFolder
from trainer.errors import TrainerError
from trainer.signals import StopRequest

EXIT_CODE = 3  # of a process that the watchdog ended

Phase = Literal["start", "data", "forward", "backward", "update", "settle", "save", "sample"]

_LOOK_SECONDS = 1.0
_PULSES_SECONDS = 3.5  # in which every watchdog that lives gives a sign of life
_FIRST_STEP = 4  # times as patient: files are opened, caches filled, kernels compiled
_EXIT_SECONDS = 20.0  # for a process that has failed to be gone
_STORE_SECONDS = 5.0  # that the store is kept for the others to read why the run ends
# How gloo and NCCL say that another process is gone, and that it does not answer.
_COLLECTIVE = re.compile(r"gloo|nccl|c10d", re.IGNORECASE)
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|remote process exited|no route to host", re.IGNORECASE
)
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)

_progress = Progress(since=time.monotonic())


def enter(phase: Phase, step: int | None = None) -> None:
    """Tell the watchdog of this process what it does from now on, and in which step (by default the same as before).

    Between two calls no more than `train.hang_timeout` may pass. It costs less than a microsecond.
    """
    global _progress
    _progress = _progress.enter(phase, step)


class Watchdog:
    """Watches over what happens in its `with` block on every rank, from the joining of the process group on.

    Without a fault it does nothing. Where this rank raises, the others end within seconds and name it and the reason;
    where a rank hangs, all write their stacks and end. What all ranks raise together (`agreed`) they tell themselves.
    """

    def __init__(self, *, rank: int, world_size: int, hang_timeout: float, stop: StopRequest) -> None:
        self.folder: RunFolder | None = None  # where stacks and events go, once the run has claimed it
        self._rank, self._world_size = rank, world_size
        self._peers = Peers(rendezvous.own_connection(), rank=rank, world_size=world_size, host=socket.gethostname())
        self._hang_timeout = hang_timeout
        self._stop = stop
        self._closed = threading.Event()
        self._one_end = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        global _progress
        _progress = Progress(since=time.monotonic())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        told_by_all = error is None or (isinstance(error, TrainerError) and error.agreed)
        if error is not None and not told_by_all and self._world_size > 1:
            self._failed(error)
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._leave()
        if not told_by_all and self._world_size > 1:
            faulthandler.dump_traceback_later(_EXIT_SECONDS, exit=True)  # the others have ended; nothing may keep this

    def _watch(self) -> None:
        heard = None
        while not self._closed.wait(_LOOK_SECONDS):
            limit = self._hang_timeout * (_FIRST_STEP if _progress.steps < 2 else 1)
            if limit:
                # Where something keeps the interpreter's lock, this thread stands still, but the timer does not.
                faulthandler.dump_traceback_later(limit + _PULSES_SECONDS, exit=True)
            # A rank that fails as well has a look's time to tell it itself.
            if heard is not None:
                self._end(heard)
            heard = self._exchange()
            if heard is None and limit and time.monotonic() - _progress.since > limit:
                heard = self._announce(Ending("hang", self._rank))
            if heard is not None and heard.kind == "hang":
                self._end(heard)

    def _exchange(self) -> Ending | None:
        """Tell how this rank is and ask whether all must end. Without a store it is alone with its timer."""
        with suppress(dist.DistError):
            self._peers.tell(_progress)
            return self._peers.ending()
        return None

    def _announce(self, ending: Ending) -> Ending:
        with suppress(dist.DistError):
            return self._peers.end(ending)
        return ending

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
        deadline = time.monotonic() + _PULSES_SECONDS
        with suppress(dist.DistError):
            before = self._peers.statuses()
            while time.monotonic() < deadline:
                ending = self._peers.ending()
                if ending is not None:
                    self._end(ending)
                if self._stop:
                    raise TrainerError(f"rank {self._rank} ends with another that is gone ({reason})") from error
                time.sleep(_PULSES_SECONDS / 50)
            silent = self._peers.silent(before, self._peers.statuses())
            if silent:
                gone = f"it is gone (killed, or its host is lost): {reason}"
                self._end(self._announce(Ending("failed", silent[0], gone)))

    def _end(self, ending: Ending) -> None:
        """End this process, in the thread that comes first; the other one waits for that."""
        self._one_end.acquire()
        faulthandler.dump_traceback_later(_EXIT_SECONDS, exit=True)  # should this hang, too
        with suppress(dist.DistError):
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
        self._peers.tell(_progress)
        before = self._peers.statuses()
        time.sleep(_PULSES_SECONDS)
        self._peers.tell(_progress)
        after = self._peers.statuses()
        line = verdict(after, self._peers.silent(before, after), self._world_size)
        where = f"above and in {self.folder.path / 'hangs'}" if self.folder is not None else "above"
        self._say(f"{line}; the run ends, stacks are {where}")
        if self.folder is not None:
            self.folder.event_here(self._rank, "hang", step=_progress.step, verdict=line)
        self._peers.conclude()

    def _await_conclusion(self) -> None:
        deadline = time.monotonic() + 3 * _PULSES_SECONDS
        while not self._peers.concluded() and time.monotonic() < deadline:
            self._peers.tell(_progress)
            time.sleep(_LOOK_SECONDS / 2)

    def _leave(self) -> None:
        """The process that holds the store waits a little for the others to have read it."""
        deadline = time.monotonic() + _STORE_SECONDS
        with suppress(dist.DistError):
            self._peers.leave()
            while rendezvous.hosts_store() and not self._peers.all_left() and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS / 20)

    @staticmethod
    def _say(text: str) -> None:
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())  # sys.stderr may be locked by the thread that hangs
