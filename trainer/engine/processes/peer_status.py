"""What ranks exchange through the store, outside collectives: their progress, and why the run must end."""

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch.distributed as dist


@dataclass(frozen=True)
class Progress:
    """Progress of a rank. `entered` counts the phases entered: all ranks enter the same phases in the same order, so
    the rank with the smallest count is the one that the others wait for.
    """

    phase: str = "start"
    step: int = 0
    entered: int = 0
    steps: int = 0  # steps begun in this process
    since: float = 0.0  # time.monotonic() of the rank's last sign of activity

    def enter(self, phase: str, step: int | None) -> "Progress":
        """The next state: another phase, another step, or the same with a new time."""
        step = self.step if step is None else step
        news = phase != self.phase or step != self.step
        return Progress(phase, step, self.entered + news, self.steps + (step != self.step), time.monotonic())

    def __str__(self) -> str:
        return f"'{self.phase}' of step {self.step}" if self.step else f"'{self.phase}'"


@dataclass(frozen=True)
class Status:
    """A rank's progress as last published. `pulse` increases for as long as its watchdog thread runs; `idle`: seconds
    without activity; `stuck`: a background task that makes no progress, or "".
    """

    progress: Progress
    pulse: int
    host: str
    idle: float = 0.0
    stuck: str = ""


@dataclass(frozen=True)
class Ending:
    """Why all ranks end: rank `rank` failed with `reason`, or rank `rank` was the first to detect a hang."""

    kind: Literal["failed", "hang"]
    rank: int
    reason: str = ""


class Peers:
    """Communication between the ranks of a run through a store.

    Methods raise torch.distributed.DistError where the store does not answer.
    """

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, host: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._mine = Status(Progress(), 0, host)

    def tell(self, progress: Progress, *, idle: float = 0.0, stuck: str = "") -> None:
        """Publish this rank's progress, and increase its watchdog's pulse."""
        self._mine = replace(self._mine, progress=progress, pulse=self._mine.pulse + 1, idle=idle, stuck=stuck)
        self._store.set(f"status/{self.rank}", json.dumps(asdict(self._mine)))

    def ending(self) -> Ending | None:
        """Why all ranks must end; None where they need not."""
        return Ending(**json.loads(self._store.get("ending"))) if self._store.check(["ending"]) else None

    def stop_requested(self, *, here: bool) -> bool:
        """Whether any rank has a request to stop; `here`: whether this one has, which is published."""
        if here:
            self._store.set("stop", "")
        return here or self._store.check(["stop"])

    def end(self, ending: Ending) -> Ending:
        """Make all ranks end. Returns the reason, which is an earlier one where another rank published first."""
        return Ending(**json.loads(self._store.compare_set("ending", "", json.dumps(asdict(ending)))))

    def statuses(self) -> dict[int, Status]:
        """The last published status of each rank that has published one."""
        found = {}
        for rank in range(self.world_size):
            if self._store.check([f"status/{rank}"]):
                fields = json.loads(self._store.get(f"status/{rank}"))
                found[rank] = Status(Progress(**fields.pop("progress")), **fields)
        return found

    def at_work(self, before: dict[int, Status], after: dict[int, Status], patience: float) -> bool:
        """Whether a rank with no more progress than this one was active within `patience` seconds, its watchdog's pulse
        having increased from `before` to `after`: then this rank waits for it, and neither hangs.
        """
        return any(
            rank != self.rank
            and rank in before
            and status.pulse > before[rank].pulse
            and status.idle < patience
            and status.progress.entered <= self._mine.progress.entered
            for rank, status in after.items()
        )

    def silent(self, before: dict[int, Status], after: dict[int, Status]) -> list[int]:
        """Ranks whose pulse is the same in `before` and `after`, which are read a few pulses apart."""
        return [
            r for r in range(self.world_size) if r not in after or (r in before and before[r].pulse == after[r].pulse)
        ]

    def conclude(self) -> None:
        """Publish that the diagnosis of a hang is complete."""
        self._store.set("concluded", "")

    def concluded(self) -> bool:
        """Whether a rank has published the diagnosis."""
        return self._store.check(["concluded"])

    def leave(self) -> None:
        """Publish that this rank no longer needs the store."""
        self._store.add("left", 1)

    def all_left(self) -> bool:
        """Whether no rank needs the store any longer."""
        return self._store.add("left", 0) >= self.world_size


def verdict(statuses: dict[int, Status], silent: list[int], world_size: int) -> str:
    """One line: which ranks hang, and which wait for them."""
    stuck = {rank: status.stuck for rank, status in statuses.items() if status.stuck}
    if world_size == 1:
        return f"this process hangs in {stuck.get(0) or statuses[0].progress}"
    if stuck and not silent:
        return f"{ranks(list(stuck))} {'hangs' if len(stuck) == 1 else 'hang'} in {next(iter(stuck.values()))}"
    if silent:
        seen = [f"{statuses[r].progress} on {statuses[r].host}" for r in silent if r in statuses]
        last = f", last seen in {seen[0]}" if len(seen) == len(silent) == 1 else ""
        guilty, deed = silent, f"gone or frozen (killed, or the host is lost){last}"
    else:
        least = min(status.progress.entered for status in statuses.values())
        guilty = [rank for rank, status in statuses.items() if status.progress.entered == least]
        deed = f"in {statuses[guilty[0]].progress}"
    waiting = [rank for rank in range(world_size) if rank not in guilty]
    if not waiting:
        return f"all {world_size} ranks hang {deed}"
    where = sorted({str(statuses[rank].progress) for rank in waiting})
    return (
        f"{ranks(guilty)} {'is' if len(guilty) == 1 else 'are'} {deed}; "
        f"{ranks(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for {'it' if len(guilty) == 1 else 'them'} "
        f"in {' and '.join(where)}"
    )


def ranks(numbers: list[int]) -> str:
    """ "rank 3", "ranks 0, 2-7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'' if len(numbers) == 1 else 's'} {', '.join(parts)}"
