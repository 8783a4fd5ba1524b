"""What the soak holds a run against: its own checkpoints, and the same run that nobody interrupted."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.harness import read_verified
from tests.soak_job import Drawn
from tests.yesterday import digest
from trainer.engine.checkpointing import sealed
from trainer.engine.checkpointing.checkpoints import STEP_NAME

CLOSE = 1e-4  # of a loss near 1, after tens of steps, where sums were taken in another order


def whole_steps(run: Path) -> list[int]:
    """Steps of the checkpoints of which every byte is as it was written, oldest first."""
    return sorted(
        int(match[1])
        for path in (run / "checkpoints").glob("step-*")
        if (match := STEP_NAME.fullmatch(path.name)) is not None and _is_whole(path)
    )


def _is_whole(path: Path) -> bool:
    try:
        for record in sealed.read_manifest(path)["files"]:
            sealed.verify_file(path, record)
    except (sealed.DamagedError, OSError):
        return False
    return True


def false_claims(run: Path, *, since: float, exit_code: int | None, last_step: int) -> list[str]:
    """DONE, STOPPED and exit code 0 of a job that began at `since` (Unix time), borne out by no whole checkpoint."""
    claims, made = [], [run / name for name in ("DONE", "STOPPED") if _is_newer(run / name, since)]
    for marker in made:
        step = int(marker.read_text().split()[1])
        if step not in (whole := whole_steps(run)) or (marker.name == "DONE" and step != last_step):
            claims.append(f"{marker.name} says step {step} of {last_step}, whole checkpoints are of {whole}")
    if exit_code == 0 and not made and not (run / "DONE").exists():
        claims.append("exit code 0, but neither DONE nor STOPPED")
    return claims


def _is_newer(path: Path, since: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= since


@dataclass(frozen=True)
class Trained:
    """What a run came to: `draws` by position, `losses` by step, and its folder."""

    run: Path
    draws: Mapping[int, Drawn]
    losses: Mapping[int, float]


def same_draws(draws: Iterable[tuple[int, Drawn]], known: dict[int, Drawn]) -> list[str]:
    """Add draws to the known ones; a position that was drawn otherwise before is a difference."""
    return [
        f"position {position}: drawn as {drawn}, and before as {known[position]}"
        for position, drawn in draws
        if known.setdefault(position, drawn) != drawn
    ]


def losses_of(run: Path) -> dict[int, float]:
    """Logged losses by step; lines that are none are passed over."""
    losses = {}
    for line in (run / "logs" / "metrics.jsonl").read_bytes().splitlines():
        try:
            record = json.loads(line)
            losses[int(record["step"])] = float(record["train/loss"])
        except (ValueError, KeyError, TypeError):
            continue
    return losses


def differences(
    run: Trained, whole: Trained, *, last_step: int, epoch: int, forgotten: set[int], exact: bool
) -> list[str]:
    """What is not as in the run that was not interrupted: images, timesteps and noise always to the bit, losses and
    state to the bit where `exact`; `forgotten` are steps whose losses the soak took out of the log.
    """
    found = _of_draws(run.draws, whole.draws, epoch)
    for step in range(1, last_step + 1):
        loss, expected = run.losses.get(step), whole.losses[step]
        if loss is None:
            if step not in forgotten:
                found.append(f"step {step}: no loss is logged")
        elif (loss != expected) if exact else not abs(loss - expected) < CLOSE:
            found.append(f"step {step}: loss {loss!r}, should be {expected!r}")
    if exact:
        found += _of_states(run.run, whole.run, last_step)
    return found


def _of_draws(draws: Mapping[int, Drawn], expected: Mapping[int, Drawn], epoch: int) -> list[str]:
    found = [
        f"position {position}: {draws.get(position)}, should be {expected.get(position)}"
        for position in sorted(draws.keys() | expected.keys())
        if draws.get(position) != expected.get(position)
    ]
    for first in range(0, len(draws) - epoch + 1, epoch):
        images = {draws[position].sample for position in range(first, first + epoch) if position in draws}
        if len(images) != epoch:
            found.append(f"epoch {first // epoch}: {len(images)} images, should be {epoch}, each once")
    return found


def _of_states(run: Path, whole: Path, step: int) -> list[str]:
    digests, expected = digest(run, step), digest(whole, step)
    found = [
        f"state of step {step}: {kind} differs"
        for kind in sorted(digests.keys() | expected.keys())
        if digests.get(kind) != expected.get(kind)
    ]
    ours, theirs = (read_verified(folder / "checkpoints" / f"step-{step:08d}")[1]["state"] for folder in (run, whole))
    return found + ([] if ours == theirs else [f"state of step {step}: its scalars differ: {ours}, {theirs}"])
