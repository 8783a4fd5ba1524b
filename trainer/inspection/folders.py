"""Finds sealed folders, both checkpoints and snapshots of averages, and their defects."""

import os
from collections.abc import Callable
from pathlib import Path

from trainer.engine.checkpointing import manifests, sealed
from trainer.engine.checkpointing.checkpoints import STEP_NAME, steps_in
from trainer.errors import CheckpointError

SNAPSHOTS = "averages"


def require_run(run: Path) -> Path:
    """Returns `run`; raises CheckpointError where it is no run's folder."""
    if not (run / "checkpoints").is_dir():
        raise CheckpointError(f"{run}: no run's folder; it has no checkpoints/")
    return run


def of_run(run: Path) -> list[Path]:
    """All checkpoints of a run, then all snapshots, oldest first."""
    require_run(run)
    return [*steps_in(run / "checkpoints").values(), *steps_in(run / SNAPSHOTS).values()]


def find(path: Path, step: int | None = None) -> Path:
    """The checkpoint that a path refers to: the path itself, or, in a run, the one of `step`, by default the newest.

    Raises CheckpointError where there is none.
    """
    if (path / sealed.MANIFEST_NAME).exists() or STEP_NAME.fullmatch(path.name):
        if step is not None:
            raise CheckpointError(f"--step {step}: goes with a run's folder, {path} is one checkpoint")
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint")
        return path
    steps = steps_in(require_run(path) / "checkpoints")
    if not steps:
        raise CheckpointError(f"{path}: holds no checkpoint")
    if step is not None and step not in steps:
        raise CheckpointError(f"--step {step}: {path} has no such checkpoint, but {', '.join(map(str, steps))}")
    return steps[step if step is not None else max(steps)]


def damages(folder: Path, verify: Callable[[Path, sealed.FileRecord], None] = sealed.verify_file) -> list[str]:
    """Defects of a sealed folder, file by file; every byte is read, none with `sealed.verify_size`. Empty where it is
    undamaged.

    Raises CheckpointError where it cannot be read: an I/O error is no proof of damage.
    """
    faults = []
    try:
        for record in manifests.read(folder)["files"]:
            try:
                verify(folder, record)
            except sealed.DamagedError as fault:
                faults.append(str(fault))
    except sealed.DamagedError as fault:
        return [str(fault)]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be verified: {error}") from error
    return faults


def check(folder: Path) -> None:
    """Raise CheckpointError where a sealed folder is damaged, or cannot be read; every byte is read."""
    if faults := damages(folder):
        raise CheckpointError(f"{folder}: damaged: {'; '.join(faults)}")


def size_on_disk(folder: Path) -> int:
    """Bytes of a folder's files, or of a file."""
    if not folder.is_dir():
        return folder.lstat().st_size
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.is_file())
