"""A run's folder and identity.

RUN/config.toml      the configuration as resolved
RUN/checkpoints/     see trainer/engine/checkpoints.py
RUN/averages/        snapshots of averages of the weights, from which others can be made, see averages.py
RUN/logs/            TensorBoard files and metrics.jsonl
RUN/samples/         grids drawn while training
RUN/nonfinite/       batches whose loss or gradient was not finite
RUN/hangs/           stacks of the ranks of a run that hung
RUN/events.jsonl     starts, resumes, checkpoints, faults, stops; events-rank-....jsonl: damaged samples of other ranks
RUN/indexes/         of tars that came without one
RUN/heartbeat.json   what the run is doing now
RUN/DONE             written when the whole duration has been trained
RUN/STOPPED          written when it was stopped on request and its state saved; gone with the next start
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import tomllib
from pathlib import Path
from typing import IO, Any

from trainer.config import Config
from trainer.data.training_data import DATA_FINGERPRINT, TrainingData
from trainer.diffusion.reverse import is_learned
from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.telemetry.heartbeat import attempt

_PATIENCE_SECONDS = 20
UNDECIDED = "undecided"  # in the identity of imported weights: the first training run decides


class RunFolder:
    """Paths of a run, its lock and its journal. Rank 0 alone writes."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.averages = path / "averages"
        self.samples = path / "samples"
        self.nonfinite = path / "nonfinite"
        self.done = path / "DONE"
        self.stopped = path / "STOPPED"
        self.config = path / "config.toml"
        self._writes = writes
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Make the folder and lock it for this process's life; the kernel frees the lock of a process that died.

        Waits a little for the workers of a killed launcher, which save before they end. Raises TrainerError where
        another job goes on training there.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("a+")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    self._lock.seek(0)
                    owner = self._lock.read().strip()
                    raise TrainerError(f"run_dir = {self.path}: another job trains there ({owner})") from None
                time.sleep(0.2)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def load_config(self) -> Config:
        """The configuration that was saved with the run. Raises ConfigError where there is none."""
        if not self.config.is_file():
            raise ConfigError(f"--run {self.path}: holds no config.toml, so it is no run's folder")
        return Config.load(self.config)

    def begin(self, config: Config) -> list[str]:
        """Save the resolved configuration; the run is not done any more, should it have been, nor stopped.

        Returns what has changed since the last start, a line a field.
        """
        changes = self._changes(config)
        self.config.write_text(config.to_toml())
        self.done.unlink(missing_ok=True)
        self.stopped.unlink(missing_ok=True)
        if changes:
            self.event("configuration", changes=changes)
        return changes

    def _changes(self, config: Config) -> list[str]:
        try:
            before = _flat(tomllib.loads(self.config.read_text()))
        except (OSError, tomllib.TOMLDecodeError):
            return []
        now = flat_fields(config)
        return [
            f"{name}: {before.get(name)} -> {now.get(name)}"
            for name in before | now
            if before.get(name) != now.get(name)
        ]

    def mark(self, marker: Path, step: int) -> None:
        """Write DONE or STOPPED for whoever started this: how the launcher exits says nothing after a signal."""
        by = f"attempt {attempt()}\n" if attempt() is not None else ""
        marker.write_text(f"step {step}\n{by}")

    def event(self, name: str, **details: Any) -> None:
        """Append a line to the journal; a journal that cannot be written is no reason to stop."""
        if self._writes:
            self._append("events.jsonl", name, details)

    def event_here(self, rank: int, name: str, **details: Any) -> None:
        """Like `event`, of what this rank alone has seen; other ranks than 0 have journals of their own."""
        self._append("events.jsonl" if self._writes else f"events-rank-{rank:05d}.jsonl", name, details)

    def _append(self, journal: str, name: str, details: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), (self.path / journal).open("a") as stream:
            stream.write(json.dumps({"time": round(time.time(), 3), "event": name, **details}) + "\n")


def flat_fields(config: Config) -> dict[str, Any]:
    """Every field that the configuration's file would have, as "train.global_batch" and so on."""
    return _flat(tomllib.loads(config.to_toml()))


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def identity(config: Config, data: TrainingData | None) -> dict[str, Any]:
    """What must not change within a run, or it would be another one: network, process, seed, batch and images.

    Without data it is that of weights that a run may start from: what belongs to the training is UNDECIDED.
    """
    fields = {f"model.{name}": value for name, value in config.model.model_dump().items()}
    process = {f"diffusion.{name}": value for name, value in config.diffusion.model_dump().items()}
    training = {name: process.pop(name) for name in ("diffusion.variance", "diffusion.loss")}
    if is_learned(config.diffusion.variance):
        process["diffusion.variance"] = training.pop("diffusion.variance")  # what half of the network's output means
    elif config.diffusion.loss == "mse":
        del training["diffusion.variance"]  # only sampling knows of it
    training |= {"seed": config.seed, "data.flip": config.data.flip, "train.global_batch": config.train.global_batch}
    if data is None:
        undecided = ["diffusion.variance", *training, DATA_FINGERPRINT]
        return {**fields, **dict.fromkeys(undecided, UNDECIDED), **process}
    return {**fields, **process, **training, **data.identity}


def check_identity(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path | str) -> None:
    """Raise CheckpointError with the differences where a checkpoint belongs to another run."""
    on_any_data = saved.get(DATA_FINGERPRINT) == UNDECIDED
    differences = [
        f"{name}: {saved.get(name)} in the checkpoint, {current.get(name)} now"
        for name in current | saved
        if saved.get(name) not in (current.get(name), UNDECIDED) and not (on_any_data and name.startswith("data"))
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint}: belongs to another run: {'; '.join(differences)}; restore these, or choose another run_dir"
        )
