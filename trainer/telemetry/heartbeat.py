"""RUN/heartbeat.json: the current activity of a run, or the last one, for monitoring from outside.

{"time": 1790000000.0, "step": 1200, "last_step": 2400000, "activity": "training", "attempt": "4711.0", "host": "n1",
"process": 4242, "seconds": {"startup": 9.1, "training": 301.5, "data": 1.4, "saving": 2.2}}
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.telemetry.files import BestEffort, count, numbers, read_object, write_whole
from trainer.telemetry.goodput import ENDS, is_time

HEARTBEAT_NAME = "heartbeat.json"
_EVERY = 10.0  # seconds between two heartbeats of the same activity


def attempt() -> str | None:
    """Job and start number as set by launch/train.sbatch ("4711.0"); None outside of jobs."""
    return os.environ.get("DDPM_ATTEMPT")


def process_age() -> float:
    """Seconds since this process was started, including the time before its first line of Python."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0


def read_heartbeat(run: Path) -> dict[str, Any] | None:
    """The last heartbeat; None where there is none, or where fields are missing or invalid."""
    beat = read_object(run / HEARTBEAT_NAME)
    if beat is None or not is_time(beat.get("time")) or count(beat.get("step")) is None:
        return None
    if not all(isinstance(beat.get(name), str) for name in ("activity", "host")):
        return None
    return {**beat, "step": count(beat["step"]), "seconds": numbers(beat.get("seconds"))}


class Heartbeat:
    """Writer of a run's heartbeat; only rank 0 `writes`. A failure to write does not end the run."""

    def __init__(self, run: Path, *, writes: bool, best_effort: BestEffort) -> None:
        self.path = run / HEARTBEAT_NAME
        self._best_effort = best_effort
        self.previous = read_heartbeat(run) if writes else None
        self._writes = writes
        self._began = time.monotonic()
        self._startup = process_age()
        self._activity = ""
        self._next = 0.0

    def beat(self, *, step: int, last_step: int, activity: str, spent: Mapping[str, float]) -> None:
        """Write the current activity; every ten seconds at most, unless it has changed.

        `spent`: seconds so far of activities other than training.
        """
        now = time.monotonic()
        if not self._writes or (activity == self._activity and now < self._next):
            return
        self._activity, self._next = activity, now + _EVERY
        content = {
            "time": round(time.time(), 3),
            "step": step,
            "last_step": last_step,
            "activity": activity,
            "attempt": attempt(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "seconds": self.seconds(spent),
        }
        with self._best_effort.writing(self.path):
            write_whole(self.path, json.dumps(content) + "\n", durable=False)

    def seconds(self, spent: Mapping[str, float]) -> dict[str, float]:
        """Seconds of this process by activity: startup, training, and those in `spent`."""
        training = time.monotonic() - self._began - sum(spent.values())
        seconds = {"startup": self._startup, "training": max(0.0, training), **spent}
        return {name: round(value, 3) for name, value in seconds.items()}

    def about_start(self, step: int) -> dict[str, Any]:
        """Fields for the journal's line on a start at `step`: what the start before lost, if it did not end regularly.

        lost_steps: steps that it had done after `step`, up to its last heartbeat; last_seen: the time of that, and its
        seconds.
        """
        told: dict[str, Any] = {"attempt": attempt(), "startup_seconds": round(self._startup, 3)}
        before = self.previous
        if before is not None and before.get("activity") not in ENDS:
            told["lost_steps"] = max(0, before["step"] - step)
            told["last_seen"] = before["time"]
            told["seconds_before"] = before["seconds"]
        return told
