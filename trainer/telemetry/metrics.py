"""Writers of scalars and pictures: TensorBoard, and the same scalars as a JSON object per line."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard.summary import hparams, text

from trainer.telemetry.files import (
    AppendedFile,
    BestEffort,
    count,
    number,
    parse_object,
    read_bytes,
    read_lines,
    write_whole,
)
from trainer.telemetry.progress import print_line
from trainer.telemetry.tensorboard import EventFile
from trainer.telemetry.trackers import Trackers

METRICS_NAME = "metrics.jsonl"


class Metrics:
    """Writer of RUN/logs; one process of a run owns it. Failures to write raise nothing.

    `step`: the step at which the run resumes; logged later steps belong to lost work that will be done again.
    Everything is also sent to the `trackers`. `say` is called with a line for each failure to read or write.
    """

    def __init__(
        self, folder: Path, step: int, trackers: Trackers | None = None, *, say: Callable[[str], None] = print_line
    ) -> None:
        self._folder = folder
        self._best_effort = BestEffort(say)
        self._lines = AppendedFile(folder / METRICS_NAME)
        self._events = EventFile(folder, goes_on_at=step + 1)
        self._step = step
        self._trackers = trackers or Trackers([], say)
        self._last: tuple[int, dict[str, float]] | None = None
        self._drop_behind: int | None = step  # None once later steps have been removed
        self._tell_what_is_unreadable()
        with self._best_effort.writing(self._lines.path):
            self._prepare()
        with self._best_effort.writing(self._folder / "events.out.tfevents"):
            self._events.flush()

    def configuration(self, toml: str, fields: Mapping[str, Any], *, judged_by: Sequence[str]) -> None:
        """Write the configuration to TensorBoard: as text, and `fields`, its values by name, as hyperparameters with
        the scalars in `judged_by` as metrics.
        """
        plain = (bool, int, float, str)
        values = {name: value if isinstance(value, plain) else str(value) for name, value in fields.items()}
        # Into the same file: torch's add_hparams would create a further run.
        shown = hparams(values, dict.fromkeys(judged_by, 0.0))
        with self._best_effort.writing(self._folder / "events.out.tfevents"):
            self._events.add(self._step, text("configuration", f"```toml\n{toml}\n```"), *shown)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write scalars of a step; repeated calls for the same step result in one line."""
        with self._best_effort.writing(self._folder / "events.out.tfevents"):
            self._events.scalars(step, values)
        again = self._last is not None and self._last[0] == step
        merged = {**self._last[1], **values} if self._last is not None and again else values
        self._last = step, merged
        with self._best_effort.writing(self._lines.path):
            self._prepare()
            (self._lines.replace_last_json if again else self._lines.append_json)({"step": step, **merged})
        self._trackers.scalars(step, merged)

    def picture(self, step: int, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Write an (H, W, C) picture."""
        with self._best_effort.writing(self._folder / "events.out.tfevents"):
            self._events.picture(step, name, pixels)
        self._trackers.picture(step, name, pixels)

    def close(self) -> None:
        """Write what is still pending, and close the trackers."""
        with self._best_effort.writing(self._folder / "events.out.tfevents"):
            self._events.flush()
        self._trackers.close()

    def _prepare(self) -> None:
        self._folder.mkdir(exist_ok=True)  # without parents: a run's folder that has vanished must not be created anew
        if self._drop_behind is not None:
            _drop_behind(self._lines.path, self._drop_behind)
            self._drop_behind = None

    def _tell_what_is_unreadable(self) -> None:
        path = self._lines.path
        try:
            *lines, _ = read_bytes(path).split(b"\n")  # the last line may be incomplete
        except FileNotFoundError:
            return
        except OSError as fault:
            self._best_effort.say(f"{path}: cannot be read ({fault.strerror}); the run goes on")
            return
        if unreadable := sum(_step_of(line) is None for line in lines):
            self._best_effort.say(f"{path}: {unreadable} of {len(lines)} lines cannot be read and count for nothing")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All scalars in RUN/logs ordered by step; for a step the last line counts.

    Each record has an integer "step"; lines without one, values that are no numbers, and an incomplete line are left
    out.
    """
    records: dict[int, dict[str, float]] = {}
    for record in read_lines(folder / METRICS_NAME):
        if (step := count(record.get("step"))) is not None:
            values = {name: value for name in record if (value := number(record[name])) is not None}
            records[step] = {**values, "step": step}
    return [records[step] for step in sorted(records)]


def _step_of(line: bytes) -> int | None:
    record = parse_object(line)
    return count(record.get("step")) if record is not None else None


def _drop_behind(path: Path, step: int) -> None:
    """Remove the records after `step`. Raises OSError. Unreadable lines are kept."""
    try:
        *lines, cut = read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return
    lines += [cut] if _step_of(cut) is not None else []
    kept = [line for line in lines if (_step_of(line) or 0) <= step]
    if len(kept) < len(lines) or cut:
        write_whole(path, b"".join(line + b"\n" for line in kept))
