"""Faults for the tests of whole runs: at the n-th time that a rank reaches a point, something happens to it."""

import ctypes
import functools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.data import stream
from trainer.engine import checkpoints, processes, sealed, step
from trainer.evaluation import outputs, work

POINTS: dict[str, tuple[Any, str]] = {
    "read": (stream.ReadAndDecode, "__call__"),  # once a micro-batch, in the loader process
    "join": (processes.rendezvous, "join"),  # once a process
    "noised_inputs": (step, "noised_inputs"),  # once a micro-batch
    "update": (step.TrainStep, "update"),  # once a step
    "write_part": (checkpoints, "_write_part"),  # once a save on every rank
    "write": (sealed, "_write"),  # twice a save on rank 0: manifest, then marker
    "work_part": (work.Work, "save"),  # once a batch that a sampling or an evaluation finishes
    "save_png": (outputs, "save_png"),  # once an image that is drawn into a folder
    "rename": (Path, "rename"),  # once a save on rank 0, while nothing is retired
}
FAULT = "TEST_FAULT"  # an environment variable, for tests/faulty_train.py


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What strikes rank `rank` when it is at `point` for the `call`-th time, counted from 1.

    `kill` strikes before the point, `kill-after` behind it; `raise` is an error of the program; `hang` never returns,
    `hold` neither, and keeps the interpreter's lock; `freeze` stops every thread of the process; `full` is a disk
    without space; `stop` is SIGTERM; `nan` spoils the images of a micro-batch (at noised_inputs).
    """

    action: Literal["kill", "kill-after", "raise", "hang", "hold", "freeze", "nan", "full", "stop"]
    point: str
    call: int
    rank: int

    def inject(self) -> None:
        """Lay the trap in this process."""
        owner, name = POINTS[self.point]
        original: Callable[..., Any] = getattr(owner, name)
        calls = 0

        @functools.wraps(original)
        def faulty(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != self.call:
                return original(*args, **kwargs)
            self._strike_before()
            return self._strike_after(original(*args, **kwargs))

        setattr(owner, name, faulty)

    def _strike_before(self) -> None:
        match self.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                raise RuntimeError("injected fault")
            case "full":
                raise OSError(28, "No space left on device")
            case "hold":
                ctypes.PyDLL(None).sleep(3600)
            case "hang":
                while True:
                    time.sleep(60)

    def _strike_after(self, result: Any) -> Any:
        match self.action:
            case "kill-after":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            case "nan":
                x0, position, eps = result
                return torch.full_like(x0, float("nan")), position, eps
        return result

    def environment(self) -> dict[str, str]:
        """Hands the fault to tests/faulty_train.py."""
        return {FAULT: json.dumps(asdict(self))}
