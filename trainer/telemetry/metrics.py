"""Scalars and pictures of a run: TensorBoard, and the same scalars as one JSON object a line."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from trainer.telemetry.trackers import Trackers

METRICS_NAME = "metrics.jsonl"


class Metrics:
    """Writer of RUN/logs; one process of a run holds it.

    `step` is where the run goes on: what was logged behind it belongs to work that was lost and will be done again.
    The `trackers` are told the same.
    """

    def __init__(self, folder: Path, step: int, trackers: Trackers | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._step = step
        self._path = folder / METRICS_NAME
        _drop_behind(self._path, step)
        self._lines = self._path.open("a")
        self._tensorboard = SummaryWriter(str(folder), purge_step=step + 1)
        self._trackers = trackers
        self._last: tuple[int, int, dict[str, float]] | None = None  # step, where its line begins, values

    def configuration(self, toml: str, fields: Mapping[str, Any], *, judged_by: Sequence[str]) -> None:
        """Show TensorBoard the configuration as text, and `fields`, its values by name, as hyperparameters, beside
        the scalars of this run that it is `judged_by`.
        """
        plain = (bool, int, float, str)
        values = {name: value if isinstance(value, plain) else str(value) for name, value in fields.items()}
        self._tensorboard.add_text("configuration", f"```toml\n{toml}\n```", self._step)
        for summary in hparams(values, dict.fromkeys(judged_by, 0.0)):  # into this file: add_hparams makes another run
            self._tensorboard._get_file_writer().add_summary(summary, self._step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of one step; a step that comes twice in a row has one line all the same."""
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._last is not None and self._last[0] == step:
            _, begin, before = self._last
            values = {**before, **values}
            self._lines.truncate(begin)
        else:
            begin = self._lines.seek(0, os.SEEK_END)
        self._last = step, begin, values
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        if self._trackers is not None:
            self._trackers.scalars(step, values)

    def picture(self, step: int, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Record an (H, W, C) picture."""
        self._tensorboard.add_image(name, pixels, step, dataformats="HWC")
        if self._trackers is not None:
            self._trackers.picture(step, name, pixels)

    def close(self) -> None:
        """Bring everything to the disk."""
        self._lines.close()
        self._tensorboard.close()
        if self._trackers is not None:
            self._trackers.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All recorded scalars of RUN/logs, oldest first; a line cut by a kill is left out."""
    path = folder / METRICS_NAME
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _drop_behind(path: Path, step: int) -> None:
    if path.exists():
        kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept))
        fresh.replace(path)
