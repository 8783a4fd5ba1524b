"""Checkpoints copied elsewhere while training goes on: every rank its part, and the first one what makes it a copy.

What fails is told and tried again with the next checkpoint: it ends neither the run nor the checkpoint on disk.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from trainer.config import CheckpointConfig
from trainer.engine import sealed
from trainer.engine.checkpoints import STEP_NAME
from trainer.engine.copy_folder import CopyFolder, words
from trainer.engine.processes import gather
from trainer.engine.run import RunFolder, check_identity
from trainer.engine.watchdog import wait_for


class Copies:
    """One checkpoint at a time is copied; of those that wait only the newest.

    Three phases, each of which ends on all ranks before the next begins: "prepare" (the first rank: is it a copy
    already, is the place this run's), "parts" (all ranks), "seal" (the first rank).
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
        self._task = _Task(_nothing)
        self._source = Path()
        self._started = 0.0
        self._wanted: Path | None = None
        self._is_ours = False  # whether the place is known to hold this run's copies or none

    @property
    def is_copying(self) -> bool:
        """Whether this rank has something under way."""
        return self._task.is_running

    @property
    def is_pending(self) -> bool:
        """Whether something is wanted that is not yet copied; the same on all ranks."""
        return self._phase != "idle" or self._wanted is not None

    def want(self, checkpoint: Path) -> None:
        """A checkpoint is complete: copy it, instead of one that has waited until now. On all ranks alike."""
        self._wanted = checkpoint

    def needs(self, step: int) -> bool:
        """Whether the checkpoint of a step must stay for a while, since it is to be copied."""
        sources = [self._source] if self._phase != "idle" else []
        return any(_step_of(path) == step for path in [*sources, *([self._wanted] if self._wanted else [])])

    def poll(self, ranks_copying: int) -> None:
        """Go on where no rank has anything under way; `ranks_copying` is what all ranks know of it. Collective."""
        if ranks_copying == 0:
            self._advance()

    def end(self) -> None:
        """Wait until all that was wanted is copied, or has failed. Collective."""
        while self.is_pending:
            self._advance()

    def _advance(self) -> None:
        if self._phase != "idle":
            outcomes = gather(self._task.outcome())
            fault = next((text for _, text in outcomes if text is not None), None)
            if fault is not None:
                self._end_with(fault)
            elif self._phase == "prepare" and outcomes[0][0] == "same":
                self._phase = "idle"
            elif self._phase == "prepare":
                self._begin("parts", self._copy_own_part)
            elif self._phase == "parts":
                self._begin("seal", self._seal if self.rank == 0 else _nothing)
            else:
                self._end_with(None)
        if self._phase == "idle" and self._wanted is not None:
            self._source, self._wanted, self._started = self._wanted, None, time.monotonic()
            self._begin("prepare", self._prepare if self.rank == 0 else _nothing)

    def _begin(self, phase: Literal["prepare", "parts", "seal"], action: Callable[[], str | None]) -> None:
        self._phase, self._task = phase, _Task(action)
        self._task.start()

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
    """Raise CheckpointError where the copies there are of another run, which would be mixed with this one's."""
    if steps := place.steps():
        manifest = place.manifest(steps[-1])
        if manifest is not None:
            check_identity(manifest["identity"], identity, place.where(steps[-1]))


class _Task:
    """Something done by a thread: what came of it, or what went wrong."""

    def __init__(self, action: Callable[[], str | None]) -> None:
        self._action = action
        self._outcome: tuple[str | None, str | None] = (None, None)
        # A daemon: an upload that hangs must not keep a process alive that is to end.
        self._thread = threading.Thread(target=self._run, daemon=True, name="copy of a checkpoint")

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def outcome(self) -> tuple[str | None, str | None]:
        """Wait; result and fault."""
        wait_for(self._thread, "copy")
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self._action(), None
        except Exception as error:  # each file system's library raises its own
            self._outcome = None, words(error)


def _nothing() -> None:
    pass


def _step_of(path: Path) -> int:
    match = STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
