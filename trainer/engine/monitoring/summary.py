"""The summary printed at the end of a training run: its duration, its outputs, and the commands to use them."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from trainer.telemetry.goodput import Goodput
from trainer.units import in_words


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The end of a run in folder `run` at `step` of `last_step`.

    `seconds`: duration of this process's training; `goodput`: over all starts of the run.
    """

    run: Path
    step: int
    last_step: int
    seconds: float
    goodput: Goodput

    def text(self) -> str:
        """Several lines; paths of checkpoint and samples only where they exist."""
        finished = self.step >= self.last_step
        took = f"{'finished' if finished else 'stopped'}: step {self.step:,} of {self.last_step:,}, "
        took += f"after {in_words(self.seconds)}"
        if self.goodput.starts > 1:
            took += f", and {in_words(self.goodput.total)} from the first of {self.goodput.starts} starts"
        rows = [("checkpoint", self._existing(f"checkpoints/step-{self.step:08d}")), ("samples", self._newest_grid())]
        lines = [took, *(f"{name:<11} {path}" for name, path in rows if path is not None)]
        if not finished:
            return "\n".join([*lines, f"{'next':<11} give the same command again: it goes on from here"])
        return "\n".join([*lines, *(f"{what:<11} {command}" for what, command in self.next_commands())])

    def next_commands(self) -> list[tuple[str, str]]:
        """Commands for a finished run, each with its purpose."""
        run = shlex.quote(str(self.run))
        exported = shlex.quote(str(self.run / "exported"))
        return [
            ("draw", f"python -m trainer.sample --run {run} --n 64"),
            ("measure", f"python -m trainer.evaluate fid --run {run}"),
            ("export", f"python -m trainer.convert export --run {run} --out {exported}"),
            ("look back", f"python -m trainer.report {run}"),
        ]

    def _existing(self, name: str) -> Path | None:
        return path if (path := self.run / name).exists() else None

    def _newest_grid(self) -> Path | None:
        return max((self.run / "samples").glob("step-*.png"), default=None)
