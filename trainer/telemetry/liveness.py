"""State of a run as seen from outside: by its markers, its lock and its heartbeat."""

import fcntl
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.telemetry.goodput import ENDS
from trainer.units import in_words

_FRESH = 60.0  # seconds; a heartbeat is written every ten


def state(run: Path, heartbeat: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]]) -> str:
    """Finished, stopped, training, starting or dead, as text."""
    age = time.time() - heartbeat["time"] if heartbeat else None
    owner = lock_owner(run / "lock")
    if age is not None and heartbeat is not None and heartbeat["activity"] not in ENDS and (owner or age < _FRESH):
        where = f"{heartbeat['activity']} on {heartbeat['host']}"
        if age < _FRESH:
            return f"{where}, seen {in_words(age)} ago"
        return f"{where}, but SILENT for {in_words(age)}: hanging, or in a long save"
    if owner:
        return f"starting: {owner}"
    if (run / "DONE").exists():
        return "finished"
    if (run / "STOPPED").exists():
        return "stopped on request, saved; start it again to go on"
    if age is not None:
        return f"DEAD: last seen {in_words(age)} ago, it neither finished nor stopped"
    if any(event["event"] == "started" for event in events):
        return "DEAD: it neither finished nor stopped"
    return "not started yet"


def lock_owner(lock: Path) -> str | None:
    """Owner of a run's lock, or None. The lock is only queried: taking it briefly could make a starting job fail."""
    if not lock.is_file():
        return None
    try:
        stream = lock.open("rb")
    except OSError:  # no permission: another user's
        return None
    with stream:
        question = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)
        try:
            answer = fcntl.fcntl(stream, fcntl.F_GETLK, question)
        except OSError:  # a file system without locks
            return None
        kind = struct.unpack("hhqqi4x", answer)[0]
        return stream.read().decode(errors="replace").strip() or "a process" if kind != fcntl.F_UNLCK else None
