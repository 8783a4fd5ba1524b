"""Experiment trackers for a run's scalars and pictures, through Accelerate's trackers.

RUN/wandb/id    the run's id at Weights & Biases, which every start of the run continues
"""

import contextlib
import importlib.util
import os
import re
import secrets
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from accelerate.tracking import GeneralTracker, WandBTracker

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.telemetry.files import BestEffort, read_bytes, write_whole

_PROJECT = "ddpm-trainer"  # default of WANDB_PROJECT
_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")


class Trackers:
    """Open trackers; none on ranks other than 0. A tracker that fails is reported and not used again; the run
    continues.
    """

    def __init__(self, trackers: Sequence[GeneralTracker], say: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._say = say

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Send scalars of a step; repeated calls for the same step are merged."""
        self._tell(lambda tracker: tracker.log(values, step=step))

    def picture(self, step: int, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Send an (H, W, C) picture."""
        self._tell(lambda tracker: tracker.log_images({name: [pixels]}, step=step))

    def close(self) -> None:
        """Send what is pending, and finish."""
        self._tell(lambda tracker: tracker.finish())

    def _tell(self, action: Callable[[GeneralTracker], object]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except (Exception, SystemExit) as fault:  # trackers raise exceptions of their libraries
                self._trackers.remove(tracker)
                self._say(f"log.trackers: {tracker.name} has failed and is told no more: {fault}")


def check_trackers(config: Config) -> None:
    """Raise ConfigError where a tracker in `log.trackers` is not installed."""
    for name in config.log.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'log.trackers = ["{name}"]: is not installed; pip install "ddpm-trainer[{name}]"')


def open_trackers(config: Config, run: Path, say: Callable[[str], None]) -> Trackers:
    """Open the trackers in `log.trackers` with the configuration; for rank 0.

    Raises ConfigError where one fails to start, OSError where the run's folder cannot be written to.
    """
    return Trackers([_open_wandb(config, run, say) for name in config.log.trackers if name == "wandb"], say)


def run_id(folder: Path, say: Callable[[str], None]) -> str:
    """The run's id at Weights & Biases; where it cannot be read a new one, which is reported.

    Raises OSError where the folder cannot be created.
    """
    folder.mkdir(exist_ok=True)
    path = folder / "id"
    if os.path.lexists(path):
        with contextlib.suppress(OSError):
            if _ID.fullmatch(found := read_bytes(path).strip()):
                return found.decode()
        say(f"{path}: holds no id that can be read; a new run begins at Weights & Biases")
    fresh = secrets.token_hex(4)
    with BestEffort(say).writing(path):
        write_whole(path, f"{fresh}\n")
    return fresh


def _open_wandb(config: Config, run: Path, say: Callable[[str], None]) -> WandBTracker:
    import wandb

    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", _PROJECT),
        id=run_id(run / "wandb", say),
        resume="allow",
        name=os.environ.get("WANDB_NAME", run.resolve().name),
        dir=str(run),
    )
    try:
        tracker.start()
        tracker.store_init_configuration(tomllib.loads(config.to_toml()))
    except wandb.Error as fault:
        raise ConfigError(
            f'log.trackers = ["wandb"]: does not start ({" ".join(str(fault).split())}); '
            'log in by "wandb login", or set WANDB_MODE=offline'
        ) from fault
    return tracker
