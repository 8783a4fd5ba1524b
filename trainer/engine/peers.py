"""What the ranks tell each other beside their collectives: how far each is, and why the run must end."""

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch.distributed as dist


@dataclass(frozen=True)
class Progress:
    """How far a rank is. `entered` counts the phases that it has entered: the ranks enter the same ones in turn, so
    the smallest count is the rank that the others wait for.
    """

    phase: str = "start"
    step: int = 0
    entered: int = 0
    steps: int = 0  # begun in this process
    since: float = 0.0  # time.monotonic() when the rank last said that it is alive

    def enter(self, phase: str, step: int | None) -> "Progress":
        """The next state: another phase, or another step, or just a sign of life."""
        step = self.step if step is None else step
        news = phase != self.phase or step != self.step
        return Progress(phase, step, self.entered + news, self.steps + (step != self.step), time.monotonic())

    def __str__(self) -> str:
        return f"'{self.phase}' of step {self.step}" if self.step else f"'{self.phase}'"


@dataclass(frozen=True)
class Status:
    """A rank's progress as it last told it. `pulse` grows for as long as its watchdog lives; `idle`: seconds for which
    the rank had given no sign of life; `stuck`: what does not get on behind its back, where something does not.
    """

    progress: Progress
    pulse: int
    host: str
    idle: float = 0.0
    stuck: str = ""


@dataclass(frozen=True)
class Ending:
    """Why all ranks end: rank `rank` failed for `reason`, or ranks hang, which rank `rank` was the first to see."""

    kind: Literal["failed", "hang"]
    rank: int
    reason: str = ""


class Peers:
    """The ranks of a run through a store. Raises torch.distributed.DistError where the store does not answer."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, host: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._mine = Status(Progress(), 0, host)

    def tell(self, progress: Progress, *, idle: float = 0.0, stuck: str = "") -> None:
        """Publish this rank's progress, with a sign of life of its watchdog."""
        self._mine = replace(self._mine, progress=progress, pulse=self._mine.pulse + 1, idle=idle, stuck=stuck)
        self._store.set(f"status/{self.rank}", json.dumps(asdict(self._mine)))

    def ending(self) -> Ending | None:
        """Why all ranks must end, if they must."""
        return Ending(**json.loads(self._store.get("ending"))) if self._store.check(["ending"]) else None

    def stop_requested(self, *, here: bool) -> bool:
        """Whether any rank has been asked to stop; `here`: this one has, which the others are told."""
        if here:
            self._store.set("stop", "")
        return here or self._store.check(["stop"])

    def end(self, ending: Ending) -> Ending:
        """Make all ranks end; returns the reason, which is an earlier one where another rank was faster."""
        return Ending(**json.loads(self._store.compare_set("ending", "", json.dumps(asdict(ending)))))

    def statuses(self) -> dict[int, Status]:
        """What each rank last told, of those that have told anything."""
        found = {}
        for rank in range(self.world_size):
            if self._store.check([f"status/{rank}"]):
                fields = json.loads(self._store.get(f"status/{rank}"))
                found[rank] = Status(Progress(**fields.pop("progress")), **fields)
        return found

    def at_work(self, before: dict[int, Status], after: dict[int, Status], patience: float) -> bool:
        """Whether a rank that is no further than this one gave signs of life within `patience` seconds, and its
        watchdog between two looks: then this one waits for it, and neither hangs.
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
        """Ranks that gave no sign of life between two looks, a few pulses apart."""
        return [
            r for r in range(self.world_size) if r not in after or (r in before and before[r].pulse == after[r].pulse)
        ]

    def conclude(self) -> None:
        """Tell the others that what there was to find out about a hang has been found out."""
        self._store.set("concluded", "")

    def concluded(self) -> bool:
        """Whether a rank has concluded."""
        return self._store.check(["concluded"])

    def leave(self) -> None:
        """Say that this rank needs the store no more."""
        self._store.add("left", 1)

    def all_left(self) -> bool:
        """Whether no rank needs the store any more."""
        return self._store.add("left", 0) >= self.world_size


def verdict(statuses: dict[int, Status], silent: list[int], world_size: int) -> str:
    """One line on which ranks hang and which wait for them."""
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
