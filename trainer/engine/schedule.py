"""When a run saves: checkpoints and snapshots of averages, written while training goes on, agreed by all ranks."""

from collections.abc import Callable
from typing import Any

from trainer.config import Config
from trainer.engine.checkpoints import Checkpoints
from trainer.engine.consistency import check_replicas
from trainer.engine.run import RunFolder
from trainer.engine.saving import Saving
from trainer.engine.state import TrainState
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

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.position // self.config.train.global_batch

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part is not yet on disk."""
        return self._saving is not None and not self._saving[1].is_written

    def after_step(self) -> None:
        """Save what is due after the step that has just been settled."""
        position, global_batch = self.state.position, self.config.train.global_batch
        if self.config.checkpoint.every.is_due(position, global_batch):
            self._save(self.checkpoints)
        if self.config.train.ema_snapshots.is_due(position, global_batch):
            self._save(self.snapshots)

    def poll(self, ranks_writing: int) -> None:
        """Give a folder its name once no rank writes any more; `ranks_writing` is what all ranks know of it."""
        if ranks_writing == 0:
            self._finish()

    def end(self) -> None:
        """Wait for what is being written, and save the last step if that has not been done."""
        self._finish()
        if self.step > self._saved_step:
            self._save(self.checkpoints)
            self._finish()

    def _save(self, where: Checkpoints) -> None:
        self._finish()
        if where is self.checkpoints and where.exists(self.step):
            return
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

    def _finish(self) -> None:
        if self._saving is None:
            return
        (where, saving, step), self._saving = self._saving, None
        try:
            path = where.finish(saving)
        except CheckpointError as fault:
            self._failed(fault)
            return
        if where is self.checkpoints:
            self._saved_step = step
            keep_every, global_batch = self.config.checkpoint.keep_every, self.config.train.global_batch
            where.retire(self.config.checkpoint.keep, lambda step: keep_every.is_due(step * global_batch, global_batch))
        self.folder.event("checkpoint" if where is self.checkpoints else "snapshot", step=step, path=str(path))

    def _failed(self, fault: CheckpointError) -> None:
        self.folder.event("checkpoint_failed", step=self.step, reason=str(fault))
        if self.config.checkpoint.on_failure == "stop":
            raise fault
        self.say(f"step {self.step}: {fault}; training goes on, as checkpoint.on_failure says")
