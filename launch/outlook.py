"""Estimate of a run's remaining time from its speed so far."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.telemetry.goodput import read_events
from trainer.telemetry.metrics import read_metrics

_SPEED = "train/images_per_second"
_LATEST = 20  # number of log lines over which the median speed is taken
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Remaining images, and the speed measured on a number of processes."""

    images_left: int
    images_per_second: float
    world_size: int

    def seconds_on(self, world_size: int) -> float:
        """Remaining seconds on `world_size` processes, if the speed is proportional to their number."""
        return self.images_left / (self.images_per_second * world_size / self.world_size)

    def seconds_a_step(self, global_batch: int, world_size: int) -> float:
        """Seconds per step on `world_size` processes, with the same assumption."""
        return global_batch / (self.images_per_second * world_size / self.world_size)


def measured_outlook(config: Config) -> Outlook | None:
    """The outlook of a run from its logs, or None where they have no speed."""
    run, global_batch = Path(config.run_dir), config.train.global_batch
    records = [record for record in read_metrics(run / "logs") if 0 < record.get(_SPEED, 0.0) < math.inf]
    starts = [event for event in read_events(run) if event["event"] == "started" and "world_size" in event]
    if not records or not starts:
        return None
    done = int(records[-1]["step"]) * global_batch
    return Outlook(
        images_left=max(0, config.train.duration.steps(global_batch) * global_batch - done),
        images_per_second=median(record[_SPEED] for record in records[-_LATEST:]),
        world_size=int(starts[-1]["world_size"]),
    )


def parse_time(text: str) -> int:
    """Seconds of a time in SLURM's formats: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ConfigError."""
    match = _CLOCK.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--time {text}: should be minutes, H:M:S or D-H:M:S, for example 1-00:00:00 for a day")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    with_hours = days is not None or len(numbers) == 3
    hours, minutes, seconds = [*([] if with_hours else [0]), *numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def stretches(left: float, *, limit: int, grace: int) -> int:
    """Number of jobs of `limit` seconds needed, if each trains until `grace` seconds before its end."""
    return max(1, math.ceil(left / (limit - grace)))
