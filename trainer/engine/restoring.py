"""A checkpoint brought back from its copy, verified byte by byte before it gets its name."""

import posixpath
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.engine import manifests, sealed
from trainer.engine.checkpoints import STEP_NAME, Checkpoints
from trainer.engine.copy_folder import CopyFolder, words
from trainer.engine.processes import together
from trainer.engine.run import RunFolder, check_identity
from trainer.errors import CheckpointError, DataError


def is_url(text: str) -> bool:
    """Whether it names a copy that has to be fetched first."""
    return "://" in text


def list_copies(place: CopyFolder) -> list[int]:
    """Steps of which there is a copy, oldest first. Collective; CheckpointError where nobody can say."""

    def steps() -> list[int]:
        try:
            return place.steps()
        except Exception as error:  # each file system's library raises its own
            raise CheckpointError(
                f"{place.url}: cannot be listed ({words(error)}), so nobody knows whether there is a copy to go on "
                "from; try again, or leave checkpoint.copy_to out"
            ) from error

    return together(place.url, steps, kind=CheckpointError, only_rank=0)[0]


def restore(
    place: CopyFolder,
    checkpoints: Checkpoints,
    folder: RunFolder,
    identity: dict[str, Any],
    *,
    only: int | None = None,
    say: Callable[[str], None],
) -> Path | None:
    """Fetch the newest copy that is whole, or `only` that step's, into the run's checkpoints; None where there is none.

    Collective. What is not whole is told and passed over. Raises CheckpointError on all ranks where copies are there
    but none is whole, where nobody can say whether there are any, or where they are of another run.
    """
    steps = list_copies(place)
    wanted = steps if only is None else [step for step in steps if step == only]
    reasons = []
    for step in reversed(wanted):
        fault = _fetch(place, step, checkpoints, identity)
        if fault is None:
            final = checkpoints.path(step)
            checkpoints.check(final)  # as it lies on this disk
            folder.event("restored", step=step, url=place.where(step))
            say(f"{final}: restored from {place.where(step)}")
            return final
        reasons.append(f"step {step}: {fault}")
        folder.event("copy_refused", step=step, url=place.where(step), reason=fault)
        say(f"{place.where(step)}: not whole: {fault}")
    if reasons:
        raise CheckpointError(f"{place.url}: holds no copy that is whole ({'; '.join(reasons)})", agreed=True)
    return None


def restore_url(
    url: str,
    checkpoints: Checkpoints,
    folder: RunFolder,
    identity: dict[str, Any],
    *,
    say: Callable[[str], None],
) -> Path:
    """Fetch the copy that a URL names: one step's, or the newest of a run's. Errors as `restore`, also for none."""
    parent, name = posixpath.split(url.rstrip("/"))
    match = STEP_NAME.fullmatch(name)
    place = CopyFolder(parent if match else url)
    found = restore(place, checkpoints, folder, identity, only=int(match[1]) if match else None, say=say)
    if found is None:
        raise CheckpointError(f"--resume {url}: there is no complete copy", agreed=True)
    return found


def _fetch(place: CopyFolder, step: int, checkpoints: Checkpoints, identity: dict[str, Any]) -> str | None:
    """Bring a copy to its place among the checkpoints. Returns why it is not whole, or None."""
    final = checkpoints.path(step)
    staging = checkpoints.folder / f".staging-copy-{step:08d}"
    what = f"{final}: cannot be written"

    def begin() -> str | None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            for name in (sealed.MANIFEST_NAME, sealed.COMPLETE_NAME):
                place.download(step, name, staging / name)
            manifest = manifests.read(staging)
        except (DataError, sealed.DamagedError) as error:
            return str(error)
        check_identity(manifest["identity"], identity, place.where(step))
        return None

    def own_share() -> str | None:
        try:
            for record in manifests.read(staging)["files"][checkpoints.rank :: checkpoints.world_size]:
                path = staging / record.name
                place.download(step, record.name, path, size=record.bytes, sha256=record.sha256)
                sealed.fsync(path)
        except DataError as error:
            return str(error)
        return None

    def name_it() -> None:
        for name in (sealed.MANIFEST_NAME, sealed.COMPLETE_NAME):
            sealed.fsync(staging / name)
        sealed.fsync(staging)
        staging.rename(final)
        sealed.fsync(final.parent)

    faults = together(what, begin, kind=CheckpointError, only_rank=0)
    if faults == [None]:
        faults = together(what, own_share, kind=CheckpointError)
    fault = next((fault for fault in faults if fault is not None), None)
    if fault is None:
        checkpoints.supersede(place.where(step), step)  # what has this name already, and later ones
        together(what, name_it, kind=CheckpointError, only_rank=0)
    elif checkpoints.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    return fault
