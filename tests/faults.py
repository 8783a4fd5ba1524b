"""Faults for the tests of whole runs: at the n-th time that a rank reaches a point, something happens to it."""

import ctypes
import functools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer.data.stream import batches
from trainer.diffusion.ddpm import reverse
from trainer.drawing import outputs, work
from trainer.engine.checkpointing import async_save as saving
from trainer.engine.checkpointing import checkpoints, sealed
from trainer.engine.checkpointing import save_schedule as schedule
from trainer.engine.monitoring import validation
from trainer.engine.processes import collectives as processes
from trainer.engine.step import phase_step
from trainer.engine.step import train_step as step

POINTS: dict[str, tuple[Any, str]] = {
    "read": (batches, "collate"),  # once a micro-batch, in the loader process
    "join": (processes.rendezvous, "join"),  # once a process
    "device_batch": (step, "device_batch"),  # once a micro-batch
    "phase": (phase_step.PhaseStep, "_compute"),  # once a micro-batch and phase
    "update": (step.TrainStep, "update"),  # once a step
    "make_empty": (checkpoints, "_make_empty"),  # once a save on rank 0
    "write_part": (saving, "_write_part"),  # once a save on every rank
    "save_file": (saving, "save_file"),  # the same, when its bytes are written
    "load_file": (saving, "load_file"),  # the same, when they are read back
    "seal": (sealed, "seal"),  # once a save on rank 0
    "check_replicas": (schedule, "check_replicas"),  # once a save on every rank
    "write": (sealed, "_write"),  # twice a save on rank 0: manifest, then marker
    "work_part": (work.Work, "save"),  # once a batch that a sampling or an evaluation finishes
    "validate": (validation.Validation, "_score"),  # once a batch of held-out images and kind of weights
    "denoise": (reverse.ReverseProcess, "__call__"),  # once a denoising step
    "save_png": (outputs, "save_png"),  # once an image that is drawn into a folder
    "rename": (Path, "rename"),  # once a save on rank 0, while nothing is retired
}
FAULT = "TEST_FAULT"  # an environment variable, for tests/faulty_train.py


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What strikes rank `rank` when it is at `point` for the `call`-th time, counted from 1.

    `kill` strikes before the point, `kill-after` behind it; `raise` is an error of the program; `hang` never returns,
    `hold` neither, and keeps the interpreter's lock; `freeze` stops every thread of the process; `full` is a disk
    without space; `stop` is SIGTERM; `nan` spoils the images of a micro-batch (at device_batch) or its losses (at
    phase), `corrupt` a bit of the file that was written (at save_file), `drift` one of this rank's weights (at
    check_replicas).
    """

    action: Literal["kill", "kill-after", "raise", "hang", "hold", "freeze", "nan", "full", "stop", "corrupt", "drift"]
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
            self._strike_before(args)
            return self._strike_after(original(*args, **kwargs), args)

        setattr(owner, name, faulty)

    def _strike_before(self, arguments: tuple[Any, ...]) -> None:
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
            case "drift":
                _, weight = arguments[0].main.network.replicas()[0][0]
                weight.view(-1)[0].mul_(1.0000001)

    def _strike_after(self, result: Any, arguments: tuple[Any, ...]) -> Any:
        match self.action:
            case "kill-after":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            case "corrupt":
                path = Path(arguments[1])
                content = path.read_bytes()
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            case "nan":
                field = "loss" if self.point == "phase" else "x"
                return replace(result, **{field: getattr(result, field) * float("nan")})
        return result

    def environment(self) -> dict[str, str]:
        """Hands the fault to tests/faulty_train.py."""
        return {FAULT: json.dumps(asdict(self))}
