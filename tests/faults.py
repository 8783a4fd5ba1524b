"""Faults for the tests of whole runs: at the n-th time that a rank reaches a point, something happens to it."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.diffusion import reverse
from trainer.engine import checkpoints, saving, schedule, sealed, step
from trainer.evaluation import outputs, work

POINTS: dict[str, tuple[Any, str]] = {
    "noised_inputs": (step, "noised_inputs"),  # once a micro-batch
    "make_empty": (checkpoints, "_make_empty"),  # once a save on rank 0
    "write_part": (saving, "_write_part"),  # once a save on every rank
    "save_file": (saving, "save_file"),  # the same, when its bytes are written
    "load_file": (saving, "load_file"),  # the same, when they are read back
    "seal": (sealed, "seal"),  # once a save on rank 0
    "check_replicas": (schedule, "check_replicas"),  # once a save on every rank
    "write": (sealed, "_write"),  # twice a save on rank 0: manifest, then marker
    "work_part": (work.Work, "save"),  # once a batch that a sampling or an evaluation finishes
    "denoise": (reverse.ReverseProcess, "step"),  # once a denoising step
    "save_png": (outputs, "save_png"),  # once an image that is drawn into a folder
    "rename": (Path, "rename"),  # once a save on rank 0, while nothing is retired
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`kill` strikes before the point, `kill-after` behind it; `nan` spoils the images of a micro-batch; `full` is a
    disk without space; `stop` is SIGTERM; `corrupt` flips a bit of the file that was written (at save_file), `drift`
    changes one of this rank's weights (at check_replicas). `call` counts from 1.
    """

    action: Literal["kill", "kill-after", "nan", "full", "stop", "corrupt", "drift"]
    point: str
    call: int
    rank: int

    def inject(self) -> None:
        """Lay the trap in this process."""
        owner, name = POINTS[self.point]
        original: Callable[..., Any] = getattr(owner, name)
        calls = 0

        def faulty(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != self.call:
                return original(*args, **kwargs)
            if self.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.action == "full":
                raise OSError(28, "No space left on device")
            if self.action == "drift":
                _, weight = args[0].replicas()[0][0]
                weight.view(-1)[0].mul_(1.0000001)
            result = original(*args, **kwargs)
            if self.action == "corrupt":
                with Path(args[1]).open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    last = file.read(1)
                    file.seek(-1, os.SEEK_END)
                    file.write(bytes([last[0] ^ 1]))
                return result
            if self.action == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
                return result
            if self.action == "kill-after":
                os.kill(os.getpid(), signal.SIGKILL)
            x0, position, eps = result
            return torch.full_like(x0, float("nan")), position, eps

        setattr(owner, name, faulty)
