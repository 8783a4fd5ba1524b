"""Checkpoints of a run: written by all ranks, verified before use; where the newest is damaged, an older one is used.

    RUN/checkpoints/step-00001000/part-00000-of-00002.safetensors   each rank's share of the tensors
                                  manifest.json                     files and their hashes, tensors, scalars, identity
                                  COMPLETE                          the manifest's hash
    RUN/checkpoints/quarantine/step-00002000/                       damaged, with the reason in REASON
    RUN/checkpoints/superseded/step-00003000/                       newer than one that the run was taken back to

Names and shapes of the tensors depend neither on the number of ranks nor on the strategy, so any loads what any wrote.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trainer import __version__
from trainer.engine.checkpointing import manifests, sealed
from trainer.engine.checkpointing.async_save import Saving
from trainer.engine.checkpointing.manifests import FORMAT_VERSION
from trainer.engine.processes.collectives import broadcast, together
from trainer.engine.state.tensor_files import TensorReader
from trainer.engine.state.train_state import Contents
from trainer.errors import CheckpointError

STEP_NAME = re.compile(r"step-(\d{8,})")
_WEIGHTS = re.compile(r"(\w+\.)?(model|ema(-.*)?)")


class Checkpoints:
    """The checkpoints in one folder. Unless stated otherwise, methods are collective and return or raise on all ranks
    alike.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder = folder
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self.wait = accelerator.wait_for_everyone

    def path(self, step: int) -> Path:
        """Path of a step's checkpoint, whether or not it exists."""
        return self.folder / f"step-{step:08d}"

    def exists(self, step: int) -> bool:
        """Whether a checkpoint of that step exists, verified or not, as rank 0 sees it."""
        return bool(broadcast(self.path(step).exists()))

    def begin(self, contents: Contents, *, step: int, identity: Mapping[str, Any]) -> Saving:
        """Copy the state and start an async save; `finish` completes it.

        Raises CheckpointError on all ranks where any of them cannot write.
        """
        staging, final = self.folder / f".staging-step-{step:08d}", self.path(step)
        content = {
            "format_version": FORMAT_VERSION,
            "trainer_version": __version__,
            "step": step,
            "world_size": self.world_size,
            "strategy": contents.strategy,
            "state": contents.scalars,
            "identity": dict(identity),
            "tensors": {name: list(shape) for name, shape in contents.shapes.items()},
        }
        part = staging / f"part-{self.rank:05d}-of-{self.world_size:05d}.safetensors"
        together(f"{final}: cannot be written", lambda: _make_empty(staging), kind=CheckpointError, only_rank=0)
        return Saving(staging, final, content, part, contents.slices)

    def finish(self, saving: Saving) -> Path:
        """Wait until every rank has written and synced its part, then rename the folder to its final name.

        Raises CheckpointError on all ranks where any of them could not write; older checkpoints are left unchanged.
        """
        what = f"{saving.final}: cannot be written"
        try:
            records = together(what, saving.record, kind=CheckpointError)
            together(
                what,
                lambda: sealed.seal(saving.staging, saving.final, records, saving.content),
                kind=CheckpointError,
                only_rank=0,
            )
        except CheckpointError:
            if self.rank == 0:
                shutil.rmtree(saving.staging, ignore_errors=True)  # free the disk space
            raise
        return saving.final

    def save(self, contents: Contents, *, step: int, identity: Mapping[str, Any]) -> Path:
        """`begin` followed by `finish`: a synchronous save. Errors as theirs."""
        return self.finish(self.begin(contents, step=step, identity=identity))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first; not verified."""
        return list(steps_in(self.folder))

    def verify(self, path: Path) -> str | None:
        """Check the hashes of a checkpoint's files, which the ranks divide among them. Returns why it is damaged, or
        None.

        Raises CheckpointError where it cannot be read: an I/O error is no proof of damage.
        """
        what = f"{path}: cannot be verified"
        reasons = together(what, lambda: self.damage_of_own_share(path), kind=CheckpointError)
        return next((reason for reason in reasons if reason is not None), None)

    def damage_of_own_share(self, path: Path) -> str | None:
        """This rank's share of `verify`; not collective. Raises OSError where the file system fails."""
        try:
            for record in manifests.read(path)["files"][self.rank :: self.world_size]:
                sealed.verify_file(path, record)
        except sealed.DamagedError as fault:
            return str(fault)
        return None

    def find_verified(self) -> tuple[Path | None, dict[Path, str]]:
        """The newest undamaged checkpoint, or None, and the newer damaged ones, each with the reason.

        Raises CheckpointError where no checkpoint is known to be undamaged but one cannot be read: it may be readable
        later.
        """
        damaged: dict[Path, str] = {}
        unreadable: CheckpointError | None = None
        for step in reversed(broadcast(self.steps())):
            path = self.path(step)
            try:
                reason = self.verify(path)
            except CheckpointError as error:
                unreadable, reason = unreadable or error, str(error)
            if reason is None:
                return path, damaged
            damaged[path] = reason
        if unreadable is not None:
            raise unreadable
        return None, damaged

    def choose(self, path: Path | None) -> Path:
        """The given checkpoint, or the newest undamaged one; verified. Raises CheckpointError where there is none."""
        if path is not None:
            self.check(path)
            return path
        newest, _ = self.find_verified()
        if newest is None:
            raise CheckpointError(f"{self.folder}: holds no checkpoint that is whole", agreed=True)
        return newest

    def recover(self) -> tuple[Path | None, dict[Path, str]]:
        """Like `find_verified`, and move the damaged checkpoints to quarantine.

        Raises CheckpointError where checkpoints exist but none is undamaged: starting from step 0 would silently lose a
        run.
        """
        newest, damaged = self.find_verified()
        for path, reason in damaged.items():
            self._set_aside(path, "quarantine", reason)
        quarantined = broadcast(sum(path.suffix != ".REASON" for path in self.folder.glob("quarantine/*")))
        if newest is None and quarantined:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items()) or "see REASON in each"
            raise CheckpointError(
                f"{self.folder}: no checkpoint is whole, {quarantined} in quarantine/ ({reasons}); "
                "restore one from a copy, or choose another run_dir to start anew",
                agreed=True,
            )
        return newest, damaged

    def check(self, path: Path) -> None:
        """Raise CheckpointError where this checkpoint is damaged."""
        reason = self.verify(path)
        if reason is not None:
            raise CheckpointError(f"{path}: damaged: {reason}", agreed=True)

    def supersede(self, source: Path | str, first: int) -> None:
        """Move those of step `first` and later to superseded/, unless it is `source`, from which the run resumes."""
        for step in broadcast(self.steps()):
            if step > first or (step == first and self.path(step).resolve() != Path(source).resolve()):
                self._set_aside(self.path(step), "superseded", f"the run was taken back to {source}")

    def retire(self, keep: int, keep_forever: Callable[[int], bool]) -> None:
        """Delete checkpoints that are neither among the `keep` newest nor to be kept forever."""

        def delete() -> None:
            for step in self.steps()[:-keep]:
                if not keep_forever(step):
                    doomed = self.folder / f".staging-retired-{step:08d}"
                    self.path(step).rename(doomed)  # atomic: a partly deleted one would look damaged
                    shutil.rmtree(doomed, ignore_errors=True)  # what remains is deleted at the next start

        together(f"{self.folder}: an old checkpoint cannot be deleted", delete, kind=CheckpointError, only_rank=0)

    def discard_unfinished(self) -> None:
        """Delete the remains of interrupted saves and deletions."""
        if self.rank == 0:
            for leftover in self.folder.glob(".staging-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.wait()

    def _set_aside(self, path: Path, where: str, reason: str) -> None:
        def move() -> None:
            parent = self.folder / where
            parent.mkdir(exist_ok=True)
            target, copy = parent / path.name, 1
            while target.exists():
                target, copy = parent / f"{path.name}.{copy}", copy + 1
            path.rename(target)
            reason_file(target).write_text(reason + "\n")

        together(f"{path}: cannot be moved to {where}/", move, kind=CheckpointError, only_rank=0)


def steps_in(folder: Path) -> dict[int, Path]:
    """The folders named step-..., by step, oldest first; not verified."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := STEP_NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def reason_file(aside: Path) -> Path:
    """The file with the reason why this was set aside: inside it if it is a folder, otherwise beside it."""
    return aside / "REASON" if aside.is_dir() else aside.with_name(f"{aside.name}.REASON")


def open_verified(path: Path) -> tuple[TensorReader, dict[str, Any]]:
    """A reader of the tensors, which reads them on demand, and the manifest of a checkpoint whose files have been
    verified.

    Raises CheckpointError where its format version is unknown or its files do not hold exactly its tensors.
    """
    try:
        manifest = manifests.read(path)
    except (sealed.DamagedError, OSError) as fault:
        raise CheckpointError(f"{path}: {fault}") from fault
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {manifest['format_version']}, this program reads {FORMAT_VERSION}"
        )
    shapes = {name: torch.Size(shape) for name, shape in manifest["tensors"].items()}
    try:
        return TensorReader([path / record.name for record in manifest["files"]], shapes), manifest
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_weights(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A network's state dict and the manifest of a verified checkpoint.

    `kind`: "model" for the raw weights, "ema" or "ema-<sigma_rel>" for an average; of another network than the main one
    with its name in front ("critic.ema"). Raises CheckpointError where the
    checkpoint has no such weights, or where one of them is not finite.
    """
    reader, manifest = open_verified(path)
    check_kind(reader, kind, path)
    prefix = f"{kind}/"
    names = [name for name in reader.shapes if name.startswith(prefix)]
    return {name.removeprefix(prefix): _usable(reader.whole(name), f"{path}: {name}") for name in names}, manifest


def check_kind(reader: TensorReader, kind: str, path: Path) -> None:
    """Raise CheckpointError where a checkpoint has no weights of that kind."""
    kinds = {name.partition("/")[0] for name in reader.shapes}
    if kind not in kinds:
        known = sorted(filter(is_weights, kinds))
        raise CheckpointError(f"{path}: has no weights {kind!r}, but {', '.join(known)}", agreed=True)


def is_weights(kind: str) -> bool:
    """Whether tensors of that kind are a network's raw or averaged weights, as "model" and "critic.ema-0.1" are."""
    return _WEIGHTS.fullmatch(kind) is not None


def _usable(weight: torch.Tensor, where: str) -> torch.Tensor:
    if not weight.is_floating_point():
        raise CheckpointError(f"{where}: {weight.dtype}, weights are floating point numbers", agreed=True)
    if not bool(weight.float().isfinite().all()):  # in float32, the network's dtype
        raise CheckpointError(f"{where}: holds NaN or infinity; take an older checkpoint", agreed=True)
    return weight


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
