"""Which checkpoint a run goes on from, and going on from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.engine.checkpoints import Checkpoints, open_verified
from trainer.engine.processes import broadcast, together
from trainer.engine.run import RunFolder, check_identity
from trainer.engine.state import TrainState
from trainer.errors import CheckpointError


def find_checkpoint(
    checkpoints: Checkpoints, folder: RunFolder, resume: str, *, say: Callable[[str], None]
) -> Path | None:
    """The verified checkpoint that `resume` ("auto", "none" or a path) asks for; None to start.

    Raises CheckpointError on all ranks where there is none such, or where a new run would mix with an old one.
    """
    if resume == "auto":
        newest, damaged = checkpoints.recover()
        for path, reason in damaged.items():
            folder.event("quarantined", checkpoint=path.name, reason=reason)
            say(f"{path}: damaged: {reason}; moved to quarantine/")
        return newest
    if resume == "none":
        if broadcast(bool(checkpoints.steps() or any(checkpoints.folder.glob("quarantine/*")))):
            raise CheckpointError(
                f"{checkpoints.folder}: holds checkpoints of an earlier run, which --resume none would mix with a new "
                "one; choose another run_dir, or move the folder away",
                agreed=True,
            )
        return None
    if not broadcast(Path(resume).is_dir()):
        raise CheckpointError(
            f"--resume {resume}: no such checkpoint; give auto, none or the path of one (step-...)", agreed=True
        )
    checkpoints.check(Path(resume))
    return Path(resume)


def load_checkpoint(path: Path, state: TrainState, identity: dict[str, Any], *, say: Callable[[str], None]) -> int:
    """Make a verified checkpoint this run's state; returns its step.

    Raises CheckpointError on all ranks where it cannot be read or belongs to another run.
    """

    def load() -> int:
        tensors, manifest = open_verified(path)
        check_identity(manifest["identity"], identity, path)
        for remark in state.load(tensors, manifest["state"]):
            say(f"{path.name}: {remark}")
        return int(manifest["step"])

    step = together(f"{path}: cannot be read", load, kind=CheckpointError)[0]
    state.strategy.weights_changed()
    return step
