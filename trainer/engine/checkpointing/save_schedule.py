"""The save schedule: checkpoints and snapshots of averages, saved asynchronously, in the same steps on all ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.engine.checkpointing import sealed
from trainer.engine.checkpointing.async_save import Saving
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.checkpointing.remote.mirror import Copies
from trainer.engine.checkpointing.remote.mirror_folder import CopyFolder
from trainer.engine.checkpointing.retention import Retention
from trainer.engine.processes.activity import enter
from trainer.engine.processes.collectives import broadcast, together
from trainer.engine.run_folder import RunFolder
from trainer.engine.state.replica_check import check_replicas
from trainer.engine.state.train_state import TrainState
from trainer.errors import CheckpointError


class SaveSchedule:
    """Every method is collective. At most one folder is being written at a time."""

    def __init__(
        self,
        *,
        config: Config,
        folder: RunFolder,
        state: TrainState,
        identity: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.folder = folder
        self.checkpoints = Checkpoints(folder.checkpoints, state.strategy.accelerator)
        self.snapshots = Checkpoints(folder.averages, state.strategy.accelerator)
        self.state = state
        self.identity = identity
        self.say = say
        self._saving: tuple[Checkpoints, Saving, int] | None = None
        self._saved_step = self.step
        self._is_last = False  # whether this save is the last one of this process
        self.retention = Retention(
            config, self.checkpoints, folder, step=self.step, is_needed=self._is_needed_for_copies, say=say
        )
        self.copies = self._open_copies()

    @property
    def step(self) -> int:
        """Number of optimizer steps settled."""
        return self.state.position // self.config.train.global_batch

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its part of a save, or verifying checkpoints for retention."""
        return (self._saving is not None and not self._saving[1].is_written) or self.retention.is_checking

    @property
    def is_copying(self) -> bool:
        """Whether this rank is uploading to the mirror."""
        return self.copies is not None and self.copies.is_copying

    def after_step(self) -> None:
        """Start the saves that are due after the step that was settled last."""
        position, global_batch = self.state.position, self.config.train.global_batch
        if self.config.checkpoint.every.is_due(position, global_batch):
            self._save(self.checkpoints)
        if self.config.train.ema_snapshots.is_due(position, global_batch):
            self._save(self.snapshots)

    def poll(self, ranks_writing: int, ranks_copying: int) -> None:
        """Complete a save once no rank is writing, and continue mirroring; all ranks pass the same two numbers."""
        if self.copies is not None:  # before a new save begins, which the numbers do not include
            self.copies.poll(ranks_copying)
        if ranks_writing == 0:
            self._retire()
            self.complete()

    def complete(self) -> None:
        """Wait for a pending save: call it before an operation of minutes, during which the run may be killed."""
        if self._saving is None:
            return
        enter("save")
        (where, saving, step), self._saving = self._saving, None
        try:
            path = where.finish(saving)
        except CheckpointError as fault:
            self._failed(fault)
            return
        if where is self.checkpoints:
            self._saved_step = step
            if self.copies is not None:
                self.copies.want(path)
            self.retention.begin()
        self.folder.event("checkpoint" if where is self.checkpoints else "snapshot", step=step, path=str(path))

    def save_last(self) -> None:
        """Wait for a pending save, and save this step unless that was done already.

        Raises CheckpointError on all ranks where its checkpoint does not exist afterwards, whatever
        `checkpoint.on_failure` is: no later save can make up for it.
        """
        self.complete()
        # The checkpoint is missing: deleted since, or resumed from elsewhere without a step trained. Step 0 needs none.
        if self.step > self._saved_step or (self.step > 0 and not self.checkpoints.exists(self.step)):
            self._is_last = True
            self._save(self.checkpoints)
            self.complete()
        if self.step > 0:
            path = self.checkpoints.path(self.step)
            together(f"{path}: is not whole", lambda: _check_there(path), kind=CheckpointError, only_rank=0)

    def end(self) -> None:
        """Save this step unless that was done already, apply retention, and wait for the mirror."""
        self.save_last()
        self.retention.begin()  # again: the last step may have been scored after it was saved
        self._retire()
        if self.copies is not None and self.copies.is_pending:
            self.say(f"step {self.step}: saved; waiting for the copy to {self.copies.place.url}")
            self.copies.end()

    def _save(self, where: Checkpoints) -> None:
        enter("save")
        self.complete()
        if where is self.checkpoints and where.exists(self.step):
            return
        together(str(self.folder.path), self.folder.check_that_it_is_there, only_rank=0)
        check_replicas(self.state, self.step)
        contents = self.state.contents() if where is self.checkpoints else self.state.snapshot_contents()
        try:
            saving = where.begin(contents, step=self.step, identity=self.identity)
        except CheckpointError as fault:
            self._failed(fault)
            return
        self._saving = where, saving, self.step
        if not self.config.checkpoint.background:
            self.complete()
            self._retire()

    def _open_copies(self) -> Copies | None:
        config, accelerator = self.config.checkpoint, self.state.strategy.accelerator
        if config.copy_to is None:
            return None
        copies = Copies(
            config,
            CopyFolder(config.copy_to),
            folder=self.folder,
            accelerator=accelerator,
            identity=self.identity,
            keep_forever=self.retention.is_kept_forever,
            say=self.say,
        )
        if steps := broadcast(self.checkpoints.steps()):  # an earlier job may not have mirrored the newest
            copies.want(self.checkpoints.path(steps[-1]))
        return copies

    def _is_needed_for_copies(self, step: int) -> bool:
        return self.copies is not None and self.copies.needs(step)

    def _retire(self) -> None:
        """Apply retention; a failure to delete is reported only, since the save itself succeeded."""
        try:
            self.retention.finish()
        except CheckpointError as fault:
            self.say(f"step {self.step}: {fault}")

    def _failed(self, fault: CheckpointError) -> None:
        together(str(self.folder.path), self.folder.check_that_it_is_there, only_rank=0)
        self.folder.event("checkpoint_failed", step=self.step, reason=str(fault))
        if self.config.checkpoint.on_failure == "stop":
            raise fault
        if self._is_last:
            saved = f"step {self._saved_step} is the last that is saved" if self._saved_step else "nothing is saved"
            raise CheckpointError(f"{fault}; the run ends at step {self.step}, and {saved}", agreed=True) from fault
        self.say(f"step {self.step}: {fault}; training goes on, as checkpoint.on_failure says")


def _check_there(path: Path) -> None:
    """Raise CheckpointError where a checkpoint is incomplete; its bytes were verified when they were written."""
    try:
        for record in sealed.read_manifest(path)["files"]:
            sealed.verify_size(path, record)
    except (sealed.DamagedError, OSError) as fault:
        raise CheckpointError(f"{path}: is not whole, so the run has not ended well: {fault}") from fault
