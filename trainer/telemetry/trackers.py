"""Other programs that are told a run's scalars and pictures, through Accelerate's trackers.

RUN/wandb/id    the run's id at Weights & Biases, which every start of the run goes on with
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

_PROJECT = "ddpm-trainer"  # where WANDB_PROJECT names no other
_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")


class Trackers:
    """Open trackers, none on ranks but 0. One that fails is told no more: what only tells of a run must not end it."""

    def __init__(self, trackers: Sequence[GeneralTracker], say: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._say = say

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Scalars of one step; a step that comes twice in a row is one."""
        self._tell(lambda tracker: tracker.log(values, step=step))

    def picture(self, step: int, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """An (H, W, C) picture."""
        self._tell(lambda tracker: tracker.log_images({name: [pixels]}, step=step))

    def close(self) -> None:
        """Hand over what is still to be told."""
        self._tell(lambda tracker: tracker.finish())

    def _tell(self, action: Callable[[GeneralTracker], object]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except (Exception, SystemExit) as fault:  # whatever other people's programs raise
                self._trackers.remove(tracker)
                self._say(f"log.trackers: {tracker.name} has failed and is told no more: {fault}")


def check_trackers(config: Config) -> None:
    """Raise ConfigError where a tracker that `log.trackers` names is not installed."""
    for name in config.log.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'log.trackers = ["{name}"]: is not installed; pip install "ddpm-trainer[{name}]"')


def open_trackers(config: Config, run: Path, say: Callable[[str], None]) -> Trackers:
    """Those that `log.trackers` names, told the configuration; for rank 0.

    Raises ConfigError where one does not start, OSError where the run's folder cannot be written to.
    """
    return Trackers([_open_wandb(config, run, say) for name in config.log.trackers if name == "wandb"], say)


def run_id(folder: Path, say: Callable[[str], None]) -> str:
    """The id that the run has at Weights & Biases; a new one, which is told, where that cannot be read.

    Raises OSError where the folder cannot be made.
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
