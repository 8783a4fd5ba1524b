"""List of a run's checkpoints: those that exist, whether they are damaged, which were set aside and why."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from trainer.engine.checkpointing import manifests, sealed
from trainer.engine.checkpointing.checkpoints import reason_file
from trainer.engine.checkpointing.scores import best, read_scores
from trainer.engine.checkpointing.sealed import COMPLETE_NAME
from trainer.engine.run_folder import RunFolder
from trainer.errors import CheckpointError, ConfigError
from trainer.inspection import folders
from trainer.inspection.text import size, table


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One folder. `saved`: local time, ISO 8601, None where unknown; `faults`: defects found; `verified`: whether every
    byte was read and matches its hash; `marks`: why it is retained.
    """

    path: str
    step: int
    saved: str | None
    bytes: int
    strategy: str | None
    world_size: int | None
    faults: list[str]
    verified: bool
    marks: list[str]


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """A folder in quarantine/ or superseded/, with the recorded reason."""

    path: str
    where: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A run's checkpoints and snapshots of averages, oldest first, and folders that were set aside."""

    run: str
    checkpoints: list[Listed]
    snapshots: list[Listed]
    set_aside: list[SetAside]


def list_run(run: Path, *, quick: bool) -> Listing:
    """Check all of a run's folders; `quick` reads no tensors, so it does not detect flipped bits.

    Raises CheckpointError where there is no run or it cannot be read.
    """
    folders.require_run(run)
    kept = _marks(run)
    checkpoints = folders.steps_in(run / "checkpoints")
    try:
        return Listing(
            run=str(run),
            checkpoints=[
                _listed(path, step, quick, [*(["newest"] if step == max(checkpoints) else []), *kept.get(step, [])])
                for step, path in checkpoints.items()
            ],
            snapshots=[
                _listed(path, step, quick, []) for step, path in folders.steps_in(run / folders.SNAPSHOTS).items()
            ],
            set_aside=[
                SetAside(path=str(path), where=where, reason=_reason(path))
                for where in ("quarantine", "superseded")
                for parent in (run / "checkpoints", run / folders.SNAPSHOTS)
                for path in sorted((parent / where).glob("step-*"))
                if path.suffix != ".REASON"
            ],
        )
    except OSError as error:
        raise CheckpointError(f"{run}: cannot be read: {error}") from error


def as_text(listing: Listing) -> str:
    """The listing as text, one table per kind."""
    lines = [f"{listing.run}"]
    if not listing.checkpoints:
        lines.append("  no checkpoints")
    lines += table(["step", "saved", "size", "written by", "state", ""], [_row(one) for one in listing.checkpoints])
    if listing.snapshots:
        lines.append("  snapshots of averages")
        lines += table(["step", "saved", "size", "written by", "state", ""], [_row(one) for one in listing.snapshots])
    for aside in listing.set_aside:
        lines.append(f"  {aside.where}/{Path(aside.path).name}: {aside.reason}")
    return "\n".join(lines)


def _row(one: Listed) -> list[str]:
    saved = one.saved.replace("T", " ")[:19] if one.saved else "?"
    state = "DAMAGED: " + "; ".join(one.faults) if one.faults else "verified" if one.verified else "not read"
    return [
        str(one.step),
        saved,
        size(one.bytes),
        written_by(one.strategy, one.world_size),
        state,
        ", ".join(one.marks),
    ]


def written_by(strategy: str | None, world_size: int | None) -> str:
    """Strategy and number of ranks, for example zero2@8."""
    return f"{strategy or '?'}@{world_size or '?'}"


def _listed(path: Path, step: int, quick: bool, marks: list[str]) -> Listed:
    manifest = manifests.read_unproven(path)
    marker = path / COMPLETE_NAME
    faults = folders.damages(path, sealed.verify_size if quick else sealed.verify_file)
    return Listed(
        path=str(path),
        step=step,
        saved=datetime.fromtimestamp(marker.stat().st_mtime).isoformat() if marker.exists() else None,
        bytes=folders.size_on_disk(path),
        strategy=manifest.get("strategy"),
        world_size=manifest.get("world_size"),
        faults=faults,
        verified=not faults and not quick,
        marks=marks,
    )


def _reason(path: Path) -> str:
    try:
        return sealed.read_file(reason_file(path)).decode(errors="replace").strip()
    except (sealed.DamagedError, OSError):
        return "no reason is given"


def _marks(run: Path) -> dict[int, list[str]]:
    """Why retention keeps checkpoints besides the newest, according to the run's configuration."""
    try:
        config = RunFolder(run, writes=False).load_config()
    except ConfigError:
        return {}
    global_batch, wanted = config.train.global_batch, config.checkpoint
    steps, scores = folders.steps_in(run / "checkpoints"), read_scores(run / "checkpoints")
    marks = {step: ["kept for ever"] for step in steps if wanted.keep_every.is_due(step * global_batch, global_batch)}
    ranking = best(scores, steps, metric=wanted.best_metric, count=wanted.keep_best)
    for rank, step in enumerate(ranking, start=1):
        marks.setdefault(step, []).append(f"best {rank}: {wanted.best_metric} {scores[step][wanted.best_metric]:.5g}")
    return marks
