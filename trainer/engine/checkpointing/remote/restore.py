"""Restores a checkpoint from its mirror; its bytes are verified before it gets its final name."""

import posixpath
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.engine.checkpointing import manifests, sealed
from trainer.engine.checkpointing.checkpoints import STEP_NAME, Checkpoints
from trainer.engine.checkpointing.remote.mirror_folder import CopyFolder, words
from trainer.engine.processes.collectives import together
from trainer.engine.run_folder import RunFolder, check_identity
from trainer.errors import CheckpointError, DataError


def list_copies(place: CopyFolder) -> list[int]:
    """Steps that have a copy, oldest first. Collective; raises CheckpointError where they cannot be listed."""

    def steps() -> list[int]:
        try:
            return place.steps()
        except Exception as error:  # fsspec backends raise exceptions of their libraries
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
    """Download the newest undamaged copy, or `only` that step's, into the run's checkpoints; None where there is none.

    Collective. Damaged copies are reported and skipped. Raises CheckpointError on all ranks where copies exist but all
    are damaged, where they cannot be listed, or where they belong to another run.
    """
    steps = list_copies(place)
    wanted = steps if only is None else [step for step in steps if step == only]
    reasons = []
    for step in reversed(wanted):
        fault = _fetch(place, step, checkpoints, identity)
        if fault is None:
            final = checkpoints.path(step)
            checkpoints.check(final)  # as written to this disk
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
    """Download a URL's copy: of one step, or the newest of a run. Errors as `restore`, also where there is none."""
    parent, name = posixpath.split(url.rstrip("/"))
    match = STEP_NAME.fullmatch(name)
    place = CopyFolder(parent if match else url)
    found = restore(place, checkpoints, folder, identity, only=int(match[1]) if match else None, say=say)
    if found is None:
        raise CheckpointError(f"--resume {url}: there is no complete copy", agreed=True)
    return found


def _fetch(place: CopyFolder, step: int, checkpoints: Checkpoints, identity: dict[str, Any]) -> str | None:
    """Download a copy into the checkpoints' folder. Returns why it is damaged, or None."""
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
        checkpoints.supersede(place.where(step), step)  # moves those of this step and later ones away
        together(what, name_it, kind=CheckpointError, only_rank=0)
    elif checkpoints.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    return fault
