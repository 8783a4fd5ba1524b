"""A long test of what a run survives: `python -m tests.soak --kills 100 --seed 0 --out DIR`.

A tiny training is started again and again. Its jobs are killed or told to stop at random moments, checkpoints and files
beside them are damaged while it is down, and some runs change strategy and number of processes at every start. A run
that has finished is compared with an uninterrupted one: images, timesteps and noise must be equal to the bit, and each
image seen once an epoch; losses and state, too, where strategy and number of processes stayed the same.

The seed fixes the sequence of faults, but not the instruction at which a signal arrives. DIR/report.json lists every
launch; the folders of runs that broke stay in DIR.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tests.faults import Fault
from tests.harness import make_dataset, overrides, write_config
from tests.soak_compare import Trained, differences, false_claims, losses_of, same_draws, whole_steps
from tests.soak_faults import Blow, damage_something, draw_blow, draw_fault
from tests.soak_job import BrokenPromiseError, Drawn, Job, read_notes

IMAGES, BATCH, STEPS = 21, 8, 40
TRAINING = overrides(
    train__duration=f"{STEPS} steps",
    train__micro_batch=4,
    checkpoint__every="3 steps",
    checkpoint__keep=4,
    log__samples_every="9 steps",
    train__hang_timeout="60 seconds",
    train__timeout="90 seconds",
)
KILLS_A_RUN = 8
MOST_LAUNCHES = 40  # of a run
SHARE_OF_DAMAGE, SHARE_OF_FAULTS, SHARE_OF_ACCELERATE = 0.6, 0.35, 0.03


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes."""

    strategy: str
    processes: int


FIXED = [
    *(Layout("ddp", 1), Layout("ddp", 2), Layout("zero2", 2), Layout("fsdp2", 2)),
    *(Layout("zero1", 2), Layout("zero3", 2), Layout("zero2", 1)),
]


@dataclass
class Run:
    """A run that is interrupted: with one layout throughout, or (None) with another one at every start."""

    name: str
    layout: Layout | None
    draws: dict[int, Drawn] = field(default_factory=dict)
    forgotten: set[int] = field(default_factory=set)
    launches: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(launch["struck"] for launch in self.launches)


class Soak:
    """Runs in `out`, all on the same images; `pick` decides everything that is left to chance."""

    def __init__(self, out: Path, pick: random.Random) -> None:
        self.out = out
        self.pick = pick
        self.data = make_dataset(out / "dataset", images=IMAGES)
        self._whole: dict[Layout | None, Trained] = {}

    def uninterrupted(self, layout: Layout | None) -> Trained:
        """The run that nobody interrupts, made once for each layout; raises BrokenPromiseError where it fails."""
        if layout not in self._whole:
            name = f"whole-{layout.strategy}-{layout.processes}" if layout is not None else "whole-roaming"
            job = self._start(name, layout or FIXED[0], jobs=self.out / f"{name}-jobs", dropout=layout is not None)
            job.wait_until(lambda: not job.runs())
            job.wait_until_gone()
            if job.exit_code() != 0:
                raise BrokenPromiseError(f"{name}: ended with {job.exit_code()}; see {job.log}")
            self._whole[layout] = Trained(self.out / name, dict(read_notes(job.notes)), losses_of(self.out / name))
        return self._whole[layout]

    def interrupted(self, name: str, layout: Layout | None, kills: int) -> Iterator[Run]:
        """Take a run to its end with at most `kills` interruptions; yields it after every job."""
        run = Run(name, layout)
        folder = self.out / name
        try:
            whole = self.uninterrupted(layout)
            while not (folder / "DONE").exists() and not run.broken:
                if len(run.launches) == MOST_LAUNCHES:
                    raise BrokenPromiseError(f"not done after {MOST_LAUNCHES} jobs")
                self._job(run, strike=run.kills < kills)
                yield run
            if not run.broken:
                trained = Trained(folder, run.draws, losses_of(folder))
                exact = layout is not None
                run.broken += differences(
                    trained, whole, last_step=STEPS, epoch=IMAGES, forgotten=run.forgotten, exact=exact
                )
        except BrokenPromiseError as fault:
            run.broken.append(str(fault))
        if not run.broken:
            shutil.rmtree(folder)
            shutil.rmtree(self.out / f"{name}-jobs")
        yield run

    def _start(
        self, name: str, layout: Layout, *, jobs: Path, dropout: bool, fault: Fault | None = None, real: bool = False
    ) -> Job:
        number = len(list(jobs.iterdir())) if jobs.exists() else 0
        config = write_config(self.out, self.data, name)
        spread = overrides(train__strategy=layout.strategy, **({} if dropout else {"model__dropout": 0.0}))
        return Job(
            layout.processes,
            ["--config", str(config), *TRAINING, *spread],
            folder=jobs / f"{number:03d}",
            fault=fault,
            accelerate=real,
        )

    def _job(self, run: Run, *, strike: bool) -> None:
        """One job of a run: started, struck, and what it has left looked at; then something may be damaged."""
        pick, folder = self.pick, self.out / run.name
        layout = run.layout or pick.choice(FIXED)
        before = whole_steps(folder)
        left = (STEPS - max(before, default=0)) * BATCH // 4
        plan: Blow | Fault | None = None
        if strike:
            by_fault = pick.random() < SHARE_OF_FAULTS
            plan = draw_fault(pick, layout.processes) if by_fault else draw_blow(pick, max(1, left // 2))
        real = pick.random() < SHARE_OF_ACCELERATE
        fault = plan if isinstance(plan, Fault) else None
        job = self._start(
            run.name,
            layout,
            jobs=self.out / f"{run.name}-jobs",
            dropout=run.layout is not None,
            fault=fault,
            real=real,
        )
        try:
            struck = plan.strike(job, pick) if isinstance(plan, Blow) else False
            job.wait_until(lambda: not job.runs())
            job.wait_until_gone()
        finally:
            for process in job.everything():
                if process.is_running():
                    process.kill()
        code, after, noted = job.exit_code(), whole_steps(folder), read_notes(job.notes)
        if fault is not None:
            struck = job.was_killed() if fault.action != "stop" else not (folder / "DONE").exists() and code == 0
        run.launches.append(
            {
                "layout": f"{layout.strategy} on {layout.processes}" + (" by accelerate" if real else ""),
                "plan": str(plan),
                "struck": struck,
                "exit_code": code,
                "seconds": round(time.monotonic() - job.started, 1),
                "steps_before": before,
                "steps_after": after,
            }
        )
        run.broken += [*_lost(before, after, noted), *same_draws(noted, run.draws)]
        run.broken += false_claims(folder, since=job.began, exit_code=code, last_step=STEPS)
        if not struck and code != 0:
            run.broken.append(f"ended with {code} though nothing was done to it; see {job.log}")
        goes_on = folder.exists() and not (folder / "DONE").exists()  # what a finished run has is compared as it is
        if not run.broken and strike and goes_on and pick.random() < SHARE_OF_DAMAGE:
            damage = damage_something(folder, pick)
            if damage is not None:
                run.launches[-1]["damage"] = damage.what
                run.forgotten |= damage.forgotten


def _lost(before: list[int], after: list[int], noted: list[tuple[int, Drawn]]) -> list[str]:
    """Work that a job lost: it must go on from the newest whole checkpoint, and leave none that is older."""
    newest, lost = max(before, default=0), []
    if max(after, default=0) < newest:
        lost.append(f"the newest whole checkpoint was of step {newest}, now it is of {max(after, default=0)}")
    # A rank that is killed before it notes its images leaves those of the others in the same batch.
    if noted and (first := min(position for position, _ in noted)) // BATCH != newest:
        lost.append(f"went on at position {first}, should be {newest * BATCH}, of step {newest}")
    return lost


def soak(out: Path, *, kills: int, seed: int) -> list[Run]:
    """All runs, one after another, until there were `kills` kills; prints a line a job, and writes the report."""
    pick, begun = random.Random(seed), time.monotonic()
    soaking = Soak(out, pick)
    runs: list[Run] = []
    for number in count():
        struck = sum(run.kills for run in runs)
        if struck >= kills:
            return runs
        layout = None if number % 3 == 2 else FIXED[(number - number // 3) % len(FIXED)]
        for run in soaking.interrupted(f"run-{number:03d}", layout, min(KILLS_A_RUN, kills - struck)):
            done = struck + run.kills
            last = json.dumps(run.launches[-1]) if run.launches else ""
            state = f"BROKEN: {run.broken}" if run.broken else "so far as it should be"
            seconds = time.monotonic() - begun
            print(f"{seconds:.0f} s, {done} of {kills} kills, {run.name}: {state}; {last}", flush=True)
        runs.append(run)
        _report(out, runs, seed=seed, seconds=time.monotonic() - begun)
    raise AssertionError("unreachable")


def _report(out: Path, runs: list[Run], *, seed: int, seconds: float) -> None:
    report = {
        "seed": seed,
        "seconds": round(seconds),
        "kills": sum(run.kills for run in runs),
        "launches": sum(len(run.launches) for run in runs),
        "damages": sum("damage" in launch for run in runs for launch in run.launches),
        "broken": {run.name: run.broken for run in runs if run.broken},
        "runs": [{"name": run.name, "layout": str(run.layout), "launches": run.launches} for run in runs],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))


def main() -> int:
    """Soak, and tell by the exit code whether anything broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="interruptions in all (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is left to chance (default 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for runs and report")
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"--out {arguments.out}: is not empty")
    runs = soak(arguments.out, kills=arguments.kills, seed=arguments.seed)
    broken = {run.name: run.broken for run in runs if run.broken}
    for name, faults in broken.items():
        print(f"{name}: {'; '.join(faults)}", file=sys.stderr)
    print(
        f"{len(runs)} runs, {sum(run.kills for run in runs)} kills, {len(broken)} broken: {arguments.out}/report.json"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
