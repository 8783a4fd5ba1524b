"""Retention: which checkpoints are kept: the newest, one every so many steps, the best. Only undamaged ones count."""

from collections.abc import Callable

from trainer.config import Config
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.checkpointing.scores import Scores, best, read_scores, write_scores
from trainer.engine.processes.background import BackgroundTask
from trainer.engine.processes.collectives import broadcast, gather
from trainer.engine.run_folder import RunFolder


class Retention:
    """Deletes old checkpoints, after those that are to be kept have been read again and verified in the background.

    A checkpoint is verified when it is written, but disks may corrupt it later. `keep` undamaged ones are kept, not
    counting damaged ones, and always the one written last.
    """

    def __init__(
        self,
        config: Config,
        checkpoints: Checkpoints,
        folder: RunFolder,
        *,
        step: int,
        is_needed: Callable[[int], bool],
        say: Callable[[str], None],
    ) -> None:
        self.config = config.checkpoint
        self.global_batch = config.train.global_batch
        self.checkpoints = checkpoints
        self.folder = folder
        self.is_needed = is_needed  # temporarily, by the mirror
        self.say = say
        found: Scores = broadcast(read_scores(checkpoints.folder))
        self.scores = {of: values for of, values in found.items() if of <= step}  # later ones: of abandoned work
        self._check: BackgroundTask[dict[int, str | None]] | None = None
        self._told: set[int] = set()

    @property
    def is_checking(self) -> bool:
        """Whether this rank is still verifying."""
        return self._check is not None and self._check.is_running

    def score(self, step: int, values: dict[str, float]) -> None:
        """Record the validation metrics of a step, before it is saved. Called on all ranks alike."""
        self.scores[step] = {**self.scores.get(step, {}), **values}
        if self.checkpoints.rank == 0:
            try:
                write_scores(self.checkpoints.folder, self.scores)
            except OSError as error:  # kept in memory; writing is tried again with the next score
                self.say(f"step {step}: the score cannot be written: {error}")

    def is_kept_forever(self, step: int) -> bool:
        """Whether a checkpoint is kept whatever its age."""
        if self.config.keep_every.is_due(step * self.global_batch, self.global_batch):
            return True
        return step in best(
            self.scores, self.checkpoints.steps(), metric=self.config.best_metric, count=self.config.keep_best
        )

    def begin(self) -> None:
        """Start verifying those to be kept after a save, if any others are to be deleted. Collective."""
        self.finish()
        steps = broadcast(self.checkpoints.steps())
        if not broadcast(any(not self._stays(step) for step in steps[: -self.config.keep])):
            return
        checked = steps[-self.config.keep : -1]
        self._check = BackgroundTask(lambda: self._damage_of(checked), name="retention", phase="save")

    def finish(self) -> None:
        """Wait for the verification and delete. Collective.

        Raises CheckpointError on all ranks where deletion fails.
        """
        if self._check is None:
            return
        own: tuple[dict[int, str | None], str | None]
        try:
            own = self._check.result(), None
        except OSError as error:
            own = {}, str(error)
        self._check = None
        damaged: dict[int, str] = {}
        for found, fault in gather(own):
            damaged |= {step: reason for step, reason in found.items() if reason is not None}
            if fault is not None:  # an I/O error, which is no proof of damage
                self.say(f"{self.checkpoints.folder}: cannot be verified, so nothing is deleted: {fault}")
                return
        for step in sorted(damaged.keys() - self._told):
            self.folder.event("damaged", step=step, reason=damaged[step])
            self.say(f"{self.checkpoints.path(step)}: damaged: {damaged[step]}; an older one stays in its place")
        self._told |= damaged.keys()
        self.checkpoints.retire(self.config.keep + len(damaged), self._stays)

    def _stays(self, step: int) -> bool:
        return self.is_kept_forever(step) or self.is_needed(step)

    def _damage_of(self, steps: list[int]) -> dict[int, str | None]:
        return {step: self.checkpoints.damage_of_own_share(self.checkpoints.path(step)) for step in steps}
