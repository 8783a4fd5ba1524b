"""A run's folder and identity.

RUN/config.toml      the configuration as resolved
RUN/checkpoints/     see trainer/engine/checkpointing/checkpoints.py
RUN/averages/        snapshots of averages of the weights, for post-hoc EMA, see state/post_hoc_ema.py
RUN/logs/            TensorBoard files and metrics.jsonl
RUN/samples/         grids drawn while training
RUN/nonfinite/       dumps of batches whose loss or gradient was not finite
RUN/hangs/           stacks of the ranks of a run that hung
RUN/events.jsonl     starts, resumes, checkpoints, faults, stops; events-rank-....jsonl: damaged samples of other ranks
RUN/indexes/         indexes of datasets of plain tars
RUN/lock             locked by the job that trains here
RUN/heartbeat.json   current activity of the run
RUN/DONE             written when the whole duration has been trained
RUN/STOPPED          written when it was stopped on request, after its state was saved; deleted by the next start
"""

import contextlib
import fcntl
import os
import socket
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trainer.config import Config
from trainer.data.training_data import DATA_FINGERPRINT, TrainingData
from trainer.engine.run_dir import check_run_dir
from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.telemetry.files import AppendedFile, BestEffort, read_bytes, write_whole
from trainer.telemetry.goodput import JOURNAL_NAME
from trainer.telemetry.heartbeat import attempt
from trainer.telemetry.progress import print_line

_PATIENCE_SECONDS = 20
UNDECIDED = "undecided"  # in the identity of imported weights: set by the first training run that starts from them


class RunFolder:
    """Paths of a run, its lock and its journal. Only rank 0 writes.

    Journal, configuration and markers are informative: where they cannot be written nothing is raised, and `say` is
    called with a warning.
    """

    def __init__(self, path: Path, *, writes: bool, say: Callable[[str], None] = print_line) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.averages = path / "averages"
        self.samples = path / "samples"
        self.nonfinite = path / "nonfinite"
        self.done = path / "DONE"
        self.stopped = path / "STOPPED"
        self.config = path / "config.toml"
        self.best_effort = BestEffort(say)
        self._writes = writes
        self._lock: IO[str] | None = None
        self._journals: dict[str, AppendedFile] = {}

    def claim(self) -> None:
        """Create the folder and lock it for the lifetime of this process; the kernel releases the lock of a dead
        process.

        Waits a little for the workers of a killed launcher, which save before they exit. Raises TrainerError where
        another job holds the lock, ConfigError where the folder is not a run's.
        """
        check_run_dir(self.path)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("a+", errors="replace")
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
        with contextlib.suppress(OSError):  # the lock is held; the owner's name is informative
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._lock.flush()

    @property
    def has_vanished(self) -> bool:
        """Whether the folder claimed by this process was deleted, moved, unmounted, or created anew by another job."""
        if self._lock is None:
            return False
        try:
            (self.path / "lock").stat()
            return os.fstat(self._lock.fileno()).st_nlink == 0  # the lock file was replaced
        except (FileNotFoundError, NotADirectoryError):
            return not self.checkpoints.is_dir()
        except OSError:  # the file system does not answer, which is no proof
            return False

    def check_that_it_is_there(self) -> None:
        """Raise TrainerError where the folder has vanished: writing would create an incomplete one in its place."""
        if self.has_vanished:
            raise TrainerError(self.vanished)

    @property
    def vanished(self) -> str:
        """The error message for that."""
        return (
            f"run_dir = {self.path}: has vanished while the run was training (deleted, moved or unmounted), so nothing "
            "can be saved there any more; bring it back, and start again to go on from its last checkpoint"
        )

    def load_config(self) -> Config:
        """The saved configuration of the run. Raises ConfigError where there is none."""
        if not self.config.is_file():
            raise ConfigError(f"--run {self.path}: holds no config.toml, so it is no run's folder")
        return Config.load(self.config)

    def begin(self, config: Config) -> list[str]:
        """Save the resolved configuration and delete the markers DONE and STOPPED.

        Returns the fields that differ from the last start's, a line each.
        """
        changes = self._changes(config)
        with self.best_effort.writing(self.config):
            self.save_config(config)
        for marker in (self.done, self.stopped):
            with self.best_effort.writing(marker):
                marker.unlink(missing_ok=True)
        if changes:
            self.event("configuration", changes=changes)
        return changes

    def save_config(self, config: Config) -> None:
        """Write the resolved configuration. Raises OSError."""
        write_whole(self.config, config.to_toml())

    def _changes(self, config: Config) -> list[str]:
        """Fields that differ from config.toml; those that an older version did not have count as their defaults."""
        try:
            before = flat_fields(Config.parse(tomllib.loads(read_bytes(self.config).decode()), source=str(self.config)))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, RecursionError, ConfigError) as fault:
            self.best_effort.say(f"{self.config}: cannot be read ({fault}), so nobody knows what has changed since")
            return []
        now = flat_fields(config)
        return [
            f"{name}: {before.get(name)} -> {now.get(name)}"
            for name in before | now
            if before.get(name) != now.get(name)
        ]

    def mark(self, marker: Path, step: int) -> None:
        """Write the marker DONE or STOPPED for the process that started this one: exit codes after a signal are the
        launcher's.

        To be called after the state of `step` was saved. Waits a little for a full disk; where the marker cannot be
        written, the next start finds the last checkpoint and ends in the same way.
        """
        by = f"attempt {attempt()}\n" if attempt() is not None else ""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with self.best_effort.writing(marker):
            while True:
                try:
                    return write_whole(marker, f"step {step}\n{by}")
                except OSError:
                    if marker.is_dir() or self.has_vanished or time.monotonic() > deadline:
                        raise
                time.sleep(0.5)

    def event(self, name: str, **details: Any) -> None:
        """Append a line to the journal; a failure to write is not raised."""
        if self._writes:
            self._append(JOURNAL_NAME, name, details)

    def event_here(self, rank: int, name: str, **details: Any) -> None:
        """Like `event`, for an event of this rank alone; ranks other than 0 have their own journal files."""
        self._append(JOURNAL_NAME if self._writes else f"events-rank-{rank:05d}.jsonl", name, details)

    def _append(self, journal: str, name: str, details: dict[str, Any]) -> None:
        file = self._journals.setdefault(journal, AppendedFile(self.path / journal))
        with self.best_effort.writing(file.path):
            file.append_json({"time": round(time.time(), 3), "event": name, **details})


def flat_fields(config: Config) -> dict[str, Any]:
    """Every field of the configuration by its dotted name, for example "train.global_batch"."""
    return flat(tomllib.loads(config.to_toml()))


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted names."""
    values: dict[str, Any] = {}
    for name, value in table.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values


def identity(config: Config, data: TrainingData | None) -> dict[str, Any]:
    """The fields that must not change within a run: network, process, seed, batch, images, what is frozen and what the
    networks started from.

    Without `data` it is the identity of imported weights: fields that belong to training are UNDECIDED.
    """
    fields = {f"model.{name}": value for name, value in config.model.model_dump().items()}
    fields |= {f"diffusion.{name}": value for name, value in config.diffusion.identity().items()}
    fields |= {"train.init_from": config.train.init_from}  # a changed one would do nothing, and nobody would notice
    training = {
        "seed": config.seed,
        "data.flip": config.data.flip,
        "train.global_batch": config.train.global_batch,
        "train.freeze": config.train.freeze,
    }
    if data is None:
        undecided = [f"diffusion.{name}" for name in config.diffusion.of_training_alone()]
        return {**fields, **dict.fromkeys([*undecided, *training, DATA_FINGERPRINT], UNDECIDED)}
    return {**fields, **training, **data.identity}


def check_identity(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path | str) -> None:
    """Raise CheckpointError with the differences where a checkpoint belongs to another run.

    A field that the saved identity lacks was added by a later version; it counts as its default, which is the behaviour
    of the version that saved it.
    """
    on_any_data = saved.get(DATA_FINGERPRINT) == UNDECIDED
    known = {name: saved[name] if name in saved else _default(name, saved) for name in current | saved}
    differences = [
        f"{name}: {value} in the checkpoint, {current.get(name)} now"
        for name, value in known.items()
        if value not in (current.get(name), UNDECIDED) and not (on_any_data and name.startswith("data"))
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint}: belongs to another run: {'; '.join(differences)}; restore these, or choose another run_dir"
        )


def _default(name: str, saved: dict[str, Any]) -> Any:
    """Default of a field of the saved kinds of configuration, by its dotted name; None where it has none or does not
    exist.
    """
    *sections, field = name.split(".")
    model: Any = Config.of_kinds(saved.get("model.kind"), saved.get("diffusion.kind"))
    for section in sections:
        model = model.model_fields[section].annotation if section in model.model_fields else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return None
    if field not in model.model_fields:
        return None
    default = model.model_fields[field].get_default(call_default_factory=True)
    return None if default is PydanticUndefined else default
