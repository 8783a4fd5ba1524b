"""Goodput: how a run's wall-clock time is divided by activity, and the share of productive training, from its journal.

RUN/events.jsonl has what is needed:
  {"event": "started", "time": ..., "step": 1200, "world_size": 16, "attempt": "4711.1", "startup_seconds": 21.3,
   "lost_steps": 38, "last_seen": ..., "seconds_before": {...}}     the last three if the one before died
  {"event": "stopped" or "finished", "time": ..., "step": ..., "seconds": {"startup": ..., "training": ..., ...}}
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.telemetry.files import count, number, numbers, read_lines

ENDS = ("stopped", "finished")  # regular ends of a start; otherwise the process died
PARTS = ("training", "data", "startup", "saving", "validating", "sampling", "redone", "waiting")
_THROWN_AWAY = {"training", "data"}  # activities that a fault wastes, by lost steps
JOURNAL_NAME = "events.jsonl"
_END_OF_TIME = 32503680000.0  # the year 3000
Event = Mapping[str, Any]


@dataclass
class Goodput:
    """Seconds since the first start, by activity: the PARTS, which add up to the total.

    "training" is productive training; "data" is waiting for data; "redone" is the share of both lost to faults;
    "waiting" is the time between an end and the next start, for example in the queue.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    starts: int = 0
    stopped: int = 0
    died: int = 0
    lost_steps: int = 0

    @property
    def total(self) -> float:
        """Seconds from the first start to the last sign of activity."""
        return sum(self.seconds.values())

    def share(self, name: str) -> float:
        """Share of a part in the total, 0 to 1."""
        return self.seconds.get(name, 0.0) / self.total if self.total else 0.0

    def scalars(self) -> dict[str, float]:
        """Scalars for the log: the share of each part, and the total."""
        shares = {f"goodput/{name}": self.share(name) for name in (*PARTS, *(self.seconds.keys() - PARTS))}
        return {**shares, "goodput/wall_seconds": self.total}


def read_starts(run: Path) -> list[dict[str, Any]]:
    """The journal's events that `add_up` needs: starts and ends."""
    return [event for event in read_events(run) if event["event"] in ("started", *ENDS)]


def read_events(run: Path) -> list[dict[str, Any]]:
    """The journal of a run, oldest first; incomplete lines are left out."""
    return read_journal(run / JOURNAL_NAME)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal file of any rank; empty where there is none.

    Each event has an "event" and a "time". Lines without these, and fields of invalid types, are left out.
    """
    events = [line for line in read_lines(path) if isinstance(line.get("event"), str) and is_time(line.get("time"))]
    return [_understood(event) for event in events]


def is_time(value: Any) -> bool:
    """Whether a value is a plausible Unix time."""
    seconds = number(value)
    return seconds is not None and 0 <= seconds < _END_OF_TIME


def _understood(event: dict[str, Any]) -> dict[str, Any]:
    kept = {**event, **{name: numbers(event[name]) for name in _TABLES if event.get(name) is not None}}
    return {name: value for name, value in kept.items() if value is None or name not in _FIELDS or _FIELDS[name](value)}


_TABLES = ("seconds", "seconds_before")
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "lost_steps"), lambda value: count(value) is not None),
    "world_size": lambda value: bool(count(value)),
    **dict.fromkeys(("startup_seconds", "last_seen"), is_time),
}


def add_up(events: Sequence[Event], heartbeat: Event | None) -> Goodput:
    """Goodput from starts and ends; the heartbeat covers the last start if it has no end."""
    result = Goodput()
    starts = [event for event in events if event["event"] == "started"]
    for start, following in zip(starts, [*starts[1:], None]):
        until = following["time"] if following is not None else float("inf")
        end = next((e for e in events if e["event"] in ENDS and start["time"] <= e["time"] < until), None)
        result.starts += 1
        seconds, last_seen = _of_one_start(start, following, end, heartbeat)
        lost = 0
        if end is not None:
            result.stopped += end["event"] == "stopped"
        elif following is not None:
            result.died += 1
            lost = int(following.get("lost_steps") or 0)
        _take_out_what_was_lost(seconds, lost, trained=lost + _steps_kept(start, following))
        result.lost_steps += lost
        if following is not None:
            began = following["time"] - (following.get("startup_seconds") or 0.0)
            seconds["waiting"] = max(0.0, began - last_seen)
        for name, value in seconds.items():
            result.seconds[name] = result.seconds.get(name, 0.0) + value
    return result


def _of_one_start(
    start: Event, following: Event | None, end: Event | None, heartbeat: Event | None
) -> tuple[dict[str, float], float]:
    """Seconds of a start by activity, and the time of its last sign of activity."""
    if end is not None:
        return dict(end.get("seconds") or {}), end["time"]
    if following is not None and following.get("last_seen"):
        return dict(following.get("seconds_before") or {}), following["last_seen"]
    if following is None and heartbeat is not None and heartbeat["time"] >= start["time"]:
        return dict(heartbeat["seconds"]), heartbeat["time"]
    return {"startup": start.get("startup_seconds") or 0.0}, start["time"]


def _steps_kept(start: Event, following: Event | None) -> int:
    if following is None:
        return 0
    return max(0, int(following.get("step") or 0) - int(start.get("step") or 0))


def _take_out_what_was_lost(seconds: dict[str, float], lost: int, *, trained: int) -> None:
    if lost and trained:
        seconds["redone"] = 0.0
        for part in seconds.keys() & _THROWN_AWAY:
            redone = seconds[part] * lost / trained
            seconds[part] -= redone
            seconds["redone"] += redone
