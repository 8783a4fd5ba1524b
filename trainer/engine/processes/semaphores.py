"""Semaphores of loader processes that start by "spawn": they have names, which a killed run leaves in /dev/shm."""

import hashlib
import multiprocessing
from pathlib import Path

_SHARED = Path("/dev/shm")


def name_semaphores(run: Path, rank: int) -> None:
    """Give the semaphores that this process makes from now on a name of the run's and the rank's own, and remove those
    that an earlier start of the same rank has left.

    To be called while the run's lock is held: no other process of this name is alive then.
    """
    prefix = f"ddpm-{hashlib.sha256(str(run.absolute()).encode(errors='surrogateescape')).hexdigest()[:16]}-{rank}"
    multiprocessing.current_process()._config["semprefix"] = f"/{prefix}"  # type: ignore[attr-defined]
    for path in _SHARED.glob(f"sem.{prefix}-*"):
        path.unlink(missing_ok=True)
