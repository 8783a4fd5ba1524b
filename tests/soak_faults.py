"""What the soak does to a run: how a job is ended, and what is damaged while it is down."""

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from tests.faults import Fault
from tests.soak_compare import losses_of, whole_steps
from tests.soak_job import Job

SAVING = ["make_empty", "write_part", "save_file", "load_file", "seal", "check_replicas", "write", "rename"]
ON_ALL_RANKS = {"write_part", "save_file", "load_file", "check_replicas"}  # the others come on rank 0 alone
TRAINING = ["join", "device_batch", "update"]


@dataclass(frozen=True, kw_only=True)
class Blow:
    """A signal from outside, `seconds` after the start or after the job's `after`-th micro-batch."""

    number: signal.Signals
    target: Literal["everything", "launcher", "rank", "ranks", "loader"]
    after: int | None
    seconds: float

    def strike(self, job: Job, pick: random.Random) -> bool:
        """Wait for the moment and send the signal; returns False where the job was over before."""
        if self.after is not None and not job.wait_until(lambda: job.micro_batches() >= (self.after or 0)):
            return False
        begun = time.monotonic() if self.after is not None else job.started
        if not job.wait_until(lambda: time.monotonic() - begun >= self.seconds):
            return False
        targets = self._targets(job, pick)
        for process in targets:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(self.number)
        return bool(targets)

    def _targets(self, job: Job, pick: random.Random) -> list[psutil.Process]:
        everything = job.everything()  # and whatever is there now is known from here on
        match self.target:
            case "everything":
                return everything
            case "launcher":
                return [job.launcher]
            case "ranks":
                return job.ranks()
            case "rank":
                return _one(job.ranks(), pick)
            case "loader":
                return _one(job.loaders(), pick)

    def __str__(self) -> str:
        moment = f"after {self.after} micro-batches and " if self.after is not None else "after "
        return f"{self.number.name} to {self.target} {moment}{self.seconds:.2f} s"


def _one(processes: list[psutil.Process], pick: random.Random) -> list[psutil.Process]:
    return [pick.choice(processes)] if processes else []


def draw_blow(pick: random.Random, micro_batches: int) -> Blow:
    """A signal at a random moment: in the start-up, or within the next `micro_batches`."""
    number, target = pick.choice(
        [
            *((signal.SIGKILL, target) for target in ("everything", "launcher", "rank", "rank", "loader")),
            *((signal.SIGTERM, target) for target in ("launcher", "rank", "ranks")),
            *((signal.SIGUSR1, target) for target in ("rank", "ranks")),
        ]
    )
    if pick.random() < 0.3:
        return Blow(number=number, target=target, after=None, seconds=pick.uniform(0, 4))  # type: ignore[arg-type]
    after = pick.randint(1, micro_batches)
    return Blow(number=number, target=target, after=after, seconds=pick.uniform(0, 0.1))  # type: ignore[arg-type]


def draw_fault(pick: random.Random, processes: int) -> Fault:
    """A death, or a request to stop, at a certain point of the program: most of them within a save."""
    point = pick.choice(SAVING + TRAINING)
    rank = pick.randrange(processes) if point in ON_ALL_RANKS or point in TRAINING else 0
    calls = {"join": 1, "device_batch": 12, "update": 12, "write": 6}.get(point, 3)
    action = pick.choice(["kill", "kill", "kill-after", "kill-after", "stop"])
    return Fault(action=action, point=point, call=pick.randint(1, calls), rank=rank)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Damage:
    """What was done to a file, and the steps whose losses went with it."""

    what: str
    forgotten: frozenset[int] = frozenset()


def damage_something(run: Path, pick: random.Random) -> Damage | None:
    """Damage the newest checkpoint, if there is an older whole one, or a file beside the checkpoints."""
    if pick.random() < 0.5 and len(whole := whole_steps(run)) >= 2:
        return _damage_checkpoint(run / "checkpoints" / f"step-{whole[-1]:08d}", pick)
    return _damage_side_file(run, pick)


def _damage_checkpoint(path: Path, pick: random.Random) -> Damage:
    if pick.random() < 0.1:
        shutil.rmtree(path)
        path.write_bytes(b"no checkpoint")
        return Damage(f"{path.name}: a file in its place")
    return Damage(pick.choice([_flip, _truncate, _remove, _empty])(pick.choice(sorted(path.iterdir())), pick))


def _damage_side_file(run: Path, pick: random.Random) -> Damage | None:
    names = ["events.jsonl", "heartbeat.json", "config.toml", "scores.json", "STOPPED", "lock", "logs/metrics.jsonl"]
    files = [run / name for name in names if (run / name).is_file()] + sorted(run.glob("logs/events.out.*"))
    if not files:
        return None
    path = pick.choice(files)
    if path.name == "metrics.jsonl":  # nothing that would turn a figure into another
        before = losses_of(run)
        what = pick.choice([_truncate, _remove, _empty, _add_rubbish])(path, pick)
        return Damage(what, frozenset(before.keys() - (losses_of(run) if path.exists() else {}).keys()))
    kinds = [_flip, _truncate, _remove, _empty, _add_rubbish]
    if path.name != "lock":  # which says that another job trains there; a run without it is refused, and rightly
        kinds.append(_folder)
    return Damage(pick.choice(kinds)(path, pick))


def _flip(path: Path, pick: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return f"{path.name}: was empty"
    place = pick.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return f"{path.name}: bit {place} flipped"


def _truncate(path: Path, pick: random.Random) -> str:
    size = path.stat().st_size
    os.truncate(path, left := pick.randrange(size) if size else 0)
    return f"{path.name}: {left} of {size} bytes left"


def _remove(path: Path, _: random.Random) -> str:
    path.unlink()
    return f"{path.name}: removed"


def _empty(path: Path, _: random.Random) -> str:
    path.write_bytes(b"")
    return f"{path.name}: emptied"


def _add_rubbish(path: Path, pick: random.Random) -> str:
    rubbish = pick.choice([b"\xff\xfe\x00\n", b"null\n", b'{"step": "x"}\n', b"[]\n", b'{"step": 1, "tra'])
    with path.open("ab") as stream:
        stream.write(rubbish)
    return f"{path.name}: {rubbish!r} added"


def _folder(path: Path, _: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return f"{path.name}: a folder in its place"
