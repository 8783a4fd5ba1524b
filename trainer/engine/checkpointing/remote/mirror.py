"""Mirrors checkpoints to a remote location while training goes on: every rank uploads its part, rank 0 seals the copy.

A failed upload is reported and repeated with the next checkpoint; it affects neither the run nor the local checkpoint.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from trainer.config import CheckpointConfig
from trainer.engine.checkpointing import sealed
from trainer.engine.checkpointing.checkpoints import STEP_NAME
from trainer.engine.checkpointing.remote.mirror_folder import CopyFolder, words
from trainer.engine.processes.background import BackgroundTask
from trainer.engine.processes.collectives import gather
from trainer.engine.run_folder import RunFolder, check_identity


class Copies:
    """Mirrors one checkpoint at a time; of those that are waiting only the newest is kept.

    Three phases, each of which ends on all ranks before the next begins: "prepare" (rank 0: is this checkpoint mirrored
    already, and is the location this run's), "parts" (all ranks upload), "seal" (rank 0 writes manifest and marker).
    """

    def __init__(
        self,
        config: CheckpointConfig,
        place: CopyFolder,
        *,
        folder: RunFolder,
        accelerator: Accelerator,
        identity: dict[str, Any],
        keep_forever: Callable[[int], bool],
        say: Callable[[str], None],
    ) -> None:
        self.keep = config.copy_keep
        self.place = place
        self.folder = folder
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self.identity = identity
        self.keep_forever = keep_forever
        self.say = say
        self._phase: Literal["idle", "prepare", "parts", "seal"] = "idle"
        self._task: BackgroundTask[str | None] | None = None
        self._source = Path()
        self._started = 0.0
        self._wanted: Path | None = None
        self._is_ours = False  # whether the location has been checked to hold copies of this run or none

    @property
    def is_copying(self) -> bool:
        """Whether this rank has an upload in progress."""
        return self._task is not None and self._task.is_running

    @property
    def is_pending(self) -> bool:
        """Whether a requested checkpoint has not been mirrored yet; the same on all ranks."""
        return self._phase != "idle" or self._wanted is not None

    def want(self, checkpoint: Path) -> None:
        """Request a mirror of a complete checkpoint, in place of one that is still waiting. Called on all ranks."""
        self._wanted = checkpoint

    def needs(self, step: int) -> bool:
        """Whether the checkpoint of a step must not be deleted yet, because it is to be mirrored."""
        sources = [self._source] if self._phase != "idle" else []
        return any(_step_of(path) == step for path in [*sources, *([self._wanted] if self._wanted else [])])

    def poll(self, ranks_copying: int) -> None:
        """Start the next phase where no rank has an upload in progress; `ranks_copying` is their number. Collective."""
        if ranks_copying == 0:
            self._advance()

    def end(self) -> None:
        """Wait until everything requested has been mirrored or has failed. Collective."""
        while self.is_pending:
            self._advance()

    def _advance(self) -> None:
        if self._phase != "idle":
            outcomes = gather(self._outcome())
            fault = next((text for _, text in outcomes if text is not None), None)
            if fault is not None:
                self._end_with(fault)
            elif self._phase == "prepare" and outcomes[0][0] == "same":
                self._phase = "idle"
            elif self._phase == "prepare":
                self._begin("parts", self._copy_own_part)
            elif self._phase == "parts":
                self._begin("seal", self._seal if self.rank == 0 else lambda: None)
            else:
                self._end_with(None)
        if self._phase == "idle" and self._wanted is not None:
            self._source, self._wanted, self._started = self._wanted, None, time.monotonic()
            self._begin("prepare", self._prepare if self.rank == 0 else lambda: None)

    def _begin(self, phase: Literal["prepare", "parts", "seal"], action: Callable[[], str | None]) -> None:
        self._phase = phase
        # A hanging upload must not keep the process alive at exit.
        self._task = BackgroundTask(action, name="copy of a checkpoint", phase="copy", abandonable=True)

    def _outcome(self) -> tuple[str | None, str | None]:
        """Result and error message of this rank's task, which is waited for."""
        assert self._task is not None
        try:
            return self._task.result(), None
        except Exception as error:  # fsspec backends raise exceptions of their libraries
            return None, words(error)

    def _end_with(self, fault: str | None) -> None:
        self._phase = "idle"
        step, seconds = _step_of(self._source), time.monotonic() - self._started
        if fault is None:
            self.folder.event("copied", step=step, url=self.place.where(step), seconds=round(seconds, 1))
            self.say(f"step {step}: copied to {self.place.where(step)} in {seconds:.0f} s")
        else:
            self.folder.event("copy_failed", step=step, url=self.place.where(step), reason=fault)
            self.say(f"step {step}: not copied to {self.place.url}: {fault}; tried again with the next checkpoint")

    def _prepare(self) -> str | None:
        step = _step_of(self._source)
        if not self._is_ours:
            check_place(self.place, self.identity)
            self._is_ours = True
        if self.place.marker(step) == (self._source / sealed.COMPLETE_NAME).read_text().strip():
            return "same"
        self.place.open(step)
        return None

    def _copy_own_part(self) -> None:
        records = sealed.read_manifest(self._source)["files"]
        self.place.upload(self._source, _step_of(self._source), records[self.rank :: self.world_size])

    def _seal(self) -> None:
        step = _step_of(self._source)
        self.place.seal(self._source, step)
        self.place.tidy(step, sealed.read_manifest(self._source)["files"], self.keep, self.keep_forever)


def check_place(place: CopyFolder, identity: dict[str, Any]) -> None:
    """Raise CheckpointError where the copies at that location belong to another run."""
    if steps := place.steps():
        manifest = place.manifest(steps[-1])
        if manifest is not None:
            check_identity(manifest["identity"], identity, place.where(steps[-1]))


def _step_of(path: Path) -> int:
    match = STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
