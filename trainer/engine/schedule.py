"""When a run saves: checkpoints and snapshots of averages, written while training goes on, agreed by all ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.engine import sealed
from trainer.engine.checkpoints import Checkpoints
from trainer.engine.consistency import check_replicas
from trainer.engine.copies import Copies
from trainer.engine.copy_folder import CopyFolder
from trainer.engine.processes import broadcast, together
from trainer.engine.retention import Retention
from trainer.engine.run import RunFolder
from trainer.engine.saving import Saving
from trainer.engine.state import TrainState
from trainer.engine.watchdog import enter
from trainer.errors import CheckpointError


class SaveSchedule:
    """Every method is collective. One folder at most is being written at a time."""

    def __init__(
        self,
        *,
        config: Config,
        folder: RunFolder,
        checkpoints: Checkpoints,
        state: TrainState,
        identity: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.folder = folder
        self.checkpoints = checkpoints
        self.snapshots = Checkpoints(folder.averages, state.strategy.accelerator)
        self.state = state
        self.identity = identity
        self.say = say
        self._saving: tuple[Checkpoints, Saving, int] | None = None
        self._saved_step = self.step
        self._is_last = False  # whether the save is the last of this process
        self.retention = Retention(
            config, checkpoints, folder, step=self.step, is_needed=self._is_needed_for_copies, say=say
        )
        self.copies = self._open_copies()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.position // self.config.train.global_batch

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part is not yet on disk, or it still reads what stays before it deletes what goes."""
        return (self._saving is not None and not self._saving[1].is_written) or self.retention.is_checking

    @property
    def is_copying(self) -> bool:
        """Whether this rank is copying a checkpoint elsewhere."""
        return self.copies is not None and self.copies.is_copying

    def after_step(self) -> None:
        """Save what is due after the step that has just been settled."""
        position, global_batch = self.state.position, self.config.train.global_batch
        if self.config.checkpoint.every.is_due(position, global_batch):
            self._save(self.checkpoints)
        if self.config.train.ema_snapshots.is_due(position, global_batch):
            self._save(self.snapshots)

    def poll(self, ranks_writing: int, ranks_copying: int) -> None:
        """Give a folder its name once no rank writes any more, and go on copying; all ranks know the two numbers."""
        if self.copies is not None:  # before anything new is begun, of which the numbers say nothing
            self.copies.poll(ranks_copying)
        if ranks_writing == 0:
            self._retire()
            self._finish()

    def complete(self) -> None:
        """Wait for what is being written: before what takes minutes, in which the run may be killed."""
        self._finish()

    def save_last(self) -> None:
        """Wait for what is being written, and save this step if that has not been done.

        Raises CheckpointError on all ranks where its checkpoint is not there afterwards, whatever
        `checkpoint.on_failure` says: nothing comes that could be tried again.
        """
        self._finish()
        # Not there: deleted since, or the run went on from elsewhere and has trained nothing. Step 0 needs none.
        if self.step > self._saved_step or (self.step > 0 and not self.checkpoints.exists(self.step)):
            self._is_last = True
            self._save(self.checkpoints)
            self._finish()
        if self.step > 0:
            path = self.checkpoints.path(self.step)
            together(f"{path}: is not whole", lambda: _check_there(path), kind=CheckpointError, only_rank=0)

    def end(self) -> None:
        """Save this step if that has not been done, delete what need not stay, and wait for copies."""
        self.save_last()
        self.retention.begin()  # again: the last step may have been measured after it was saved
        self._retire()
        if self.copies is not None and self.copies.is_pending:
            self.say(f"step {self.step}: saved; waiting for the copy to {self.copies.place.url}")
            self.copies.end()

    def _save(self, where: Checkpoints) -> None:
        enter("save")
        self._finish()
        if where is self.checkpoints and where.exists(self.step):
            return
        together(str(self.folder.path), self.folder.check_that_it_is_there, only_rank=0)
        check_replicas(self.state.strategy, self.step)
        contents = self.state.contents() if where is self.checkpoints else self.state.snapshot_contents()
        try:
            saving = where.begin(contents, step=self.step, identity=self.identity)
        except CheckpointError as fault:
            self._failed(fault)
            return
        self._saving = where, saving, self.step
        if not self.config.checkpoint.background:
            self._finish()
            self._retire()

    def _finish(self) -> None:
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
        if steps := broadcast(self.checkpoints.steps()):  # a job that was killed may not have come to it
            copies.want(self.checkpoints.path(steps[-1]))
        return copies

    def _is_needed_for_copies(self, step: int) -> bool:
        return self.copies is not None and self.copies.needs(step)

    def _retire(self) -> None:
        """Delete what need not stay; what cannot be deleted is told, for what has been saved is saved."""
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
    """Raise CheckpointError where a checkpoint, whose bytes were verified when they were written, is not complete."""
    try:
        for record in sealed.read_manifest(path)["files"]:
            if (path / record.name).stat().st_size != record.bytes:
                raise sealed.DamagedError(f"{record.name} has not the size that was written")
    except (sealed.DamagedError, OSError) as fault:
        raise CheckpointError(f"{path}: is not whole, so the run has not ended well: {fault}") from fault
