"""Chooses the checkpoint to resume from, and loads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.engine.checkpointing.checkpoints import Checkpoints, open_verified
from trainer.engine.checkpointing.lost_checkpoints import check_that_it_is_new
from trainer.engine.checkpointing.remote.mirror_folder import CopyFolder
from trainer.engine.checkpointing.remote.restore import list_copies, restore, restore_url
from trainer.engine.processes.collectives import broadcast, together
from trainer.engine.run_folder import RunFolder, check_identity
from trainer.engine.state.train_state import TrainState
from trainer.errors import CheckpointError


def find_checkpoint(
    checkpoints: Checkpoints,
    folder: RunFolder,
    resume: str,
    *,
    copies: CopyFolder | None,
    identity: dict[str, Any],
    say: Callable[[str], None],
) -> Path | None:
    """The verified checkpoint for `resume` ("auto", "none", a path or a URL); None for a new run.

    Where "auto" finds none in the run's folder, the newest of the mirror `copies` is downloaded. Raises CheckpointError
    on all ranks where the given one does not exist, where a new run would mix with an old one, or where "auto" finds no
    checkpoint but traces of lost ones.
    """
    if resume == "auto":
        newest, damaged = checkpoints.recover()
        for path, reason in damaged.items():
            folder.event("quarantined", checkpoint=path.name, reason=reason)
            say(f"{path}: damaged: {reason}; moved to quarantine/")
        if newest is None and copies is not None:
            newest = restore(copies, checkpoints, folder, identity, say=say)
        if newest is None:
            what = f"run_dir = {folder.path}: cannot be read"
            together(what, lambda: check_that_it_is_new(folder), kind=CheckpointError, only_rank=0)
        return newest
    if resume == "none":
        if broadcast(bool(checkpoints.steps() or any(checkpoints.folder.glob("quarantine/*")))):
            raise CheckpointError(
                f"{checkpoints.folder}: holds checkpoints of an earlier run, which --resume none would mix with a new "
                "one; choose another run_dir, or move the folder away",
                agreed=True,
            )
        if copies is not None and list_copies(copies):
            raise CheckpointError(
                f"checkpoint.copy_to = {copies.url}: holds copies of an earlier run, which --resume none would mix "
                "with a new one's; choose another place, or move them away",
                agreed=True,
            )
        return None
    if "://" in resume:
        return restore_url(resume, checkpoints, folder, identity, say=say)
    if not broadcast(Path(resume).is_dir()):
        raise CheckpointError(
            f"--resume {resume}: no such checkpoint; give auto, none, or the path or URL of one (step-...)", agreed=True
        )
    checkpoints.check(Path(resume))
    return Path(resume)


def load_checkpoint(path: Path, state: TrainState, identity: dict[str, Any], *, say: Callable[[str], None]) -> int:
    """Load a verified checkpoint into the state; returns its step.

    Raises CheckpointError on all ranks where it cannot be read or belongs to another run.
    """

    def load() -> int:
        tensors, manifest = open_verified(path)
        check_identity(manifest["identity"], identity, path)
        for remark in state.load(tensors, manifest["state"]):
            say(f"{path.name}: {remark}")
        return int(manifest["step"])

    step = together(f"{path}: cannot be read", load, kind=CheckpointError)[0]
    state.weights_changed()
    return step
