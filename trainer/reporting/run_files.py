"""What a run's folder holds, read whole; the run may go on meanwhile, or never have begun."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.inspection.listing import Listing, list_run
from trainer.telemetry.goodput import Goodput, add_up, read_events, read_journal
from trainer.telemetry.heartbeat import read_heartbeat
from trainer.telemetry.liveness import state
from trainer.telemetry.metrics import read_metrics

_ROUTINE = ("checkpoint", "snapshot", "copied")  # events that come by the thousand and that other tables tell of


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run as its folder tells it.

    `records`: the logged scalars, oldest first; `events`: the journals of all ranks but for what is routine, oldest
    first; `checkpoints`: None where none was ever made.
    """

    path: Path
    config: Config
    state: str
    records: list[dict[str, float]]
    events: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    goodput: Goodput
    heartbeat: dict[str, Any] | None
    checkpoints: Listing | None

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as has been told."""
        told = [self.heartbeat["step"]] if self.heartbeat else []
        return max([0, *told, *(int(record["step"]) for record in self.records[-1:])])

    @property
    def last_step(self) -> int:
        """Of the whole run."""
        return self.config.train.duration.steps(self.config.train.global_batch)

    def latest(self, *names: str) -> float | None:
        """The last value of a scalar: the first of the names that was ever logged."""
        return next((record[name] for name in names for record in reversed(self.records) if name in record), None)


def read_run(run: Path) -> RunFiles:
    """Raises ConfigError where the folder is no run's, or its configuration cannot be understood."""
    submitted = sorted(run.glob("submissions/*/config.toml"), key=lambda path: path.stat().st_mtime)
    configs = [run / "config.toml"] if (run / "config.toml").is_file() else submitted[-1:]
    if not configs:
        raise ConfigError(f"{run}: holds no config.toml, so it is no run's folder")
    events, heartbeat = read_events(run), read_heartbeat(run)
    others = [event for path in run.glob("events-rank-*.jsonl") for event in read_journal(path)]
    told = [event for event in [*events, *others] if event["event"] not in _ROUTINE]
    return RunFiles(
        path=run,
        config=Config.load(configs[0]),
        state=state(run, heartbeat, events),
        records=read_metrics(run / "logs"),
        events=sorted(told, key=lambda event: event["time"]),
        starts=[event for event in events if event["event"] == "started"],
        goodput=add_up(events, heartbeat),
        heartbeat=heartbeat,
        checkpoints=list_run(run, quick=True) if (run / "checkpoints").is_dir() else None,
    )
