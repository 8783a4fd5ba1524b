"""What stays: the newest, the best, those kept for ever; and never is the last whole checkpoint deleted."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from tests.harness import checkpoint, events, launch, load_config, overrides, read_verified, write_config
from tests.stored import flip, write_checkpoint
from trainer.engine.checkpointing import sealed
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.checkpointing.retention import Retention
from trainer.engine.checkpointing.scores import best
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.run_folder import RunFolder
from trainer.errors import ConfigError

PART = "part-00001-of-00002.safetensors"


def store(run: Path, step: int) -> Path:
    return write_checkpoint(run / "checkpoints", {"model/w": torch.full((300,), float(step))}, step=step, ranks=2)


def retention(config: Path, step: int, *settings: str) -> tuple[Retention, list[str]]:
    loaded = load_config(config, *settings)
    run, lines = Path(loaded.run_dir), list[str]()
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(run / "checkpoints", make_accelerator())
    folder = RunFolder(run, writes=True)
    return Retention(loaded, checkpoints, folder, step=step, is_needed=lambda _: False, say=lines.append), lines


def steps(kept: Retention) -> list[int]:
    return kept.checkpoints.steps()


def save_and_retire(kept: Retention, run: Path, *numbers: int) -> None:
    for step in numbers:
        store(run, step)
        kept.begin()
        kept.finish()


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(config_path: Path, tmp_path: Path) -> None:
    """Two are kept, and one of them is damaged on disk: the last that is whole would be gone with the next damage."""
    run = tmp_path / "run"
    kept, lines = retention(config_path, 0, "checkpoint.keep=2")
    save_and_retire(kept, run, 2, 4)
    flip(checkpoint(run, 4) / PART)
    save_and_retire(kept, run, 6)
    assert steps(kept) == [2, 4, 6]
    (line,) = lines
    assert "step-00000004: damaged: part-00001-of-00002.safetensors differs from its sha256" in line
    flip(checkpoint(run, 6) / PART)
    assert kept.checkpoints.find_verified()[0] == checkpoint(run, 2)
    save_and_retire(kept, run, 8)
    assert steps(kept) == [2, 4, 6, 8] or kept.checkpoints.find_verified()[0] == checkpoint(run, 8)
    assert {event["step"] for event in events(run) if event["event"] == "damaged"} == {4, 6}
    save_and_retire(kept, run, 10, 12)
    assert steps(kept) == [10, 12]  # damage is no reason to keep for ever


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_with_damage_after_every_other_save_one_is_always_whole(config_path: Path, tmp_path: Path, keep: int) -> None:
    run = tmp_path / "run"
    kept, _ = retention(config_path, 0, f"checkpoint.keep={keep}")
    for step in range(1, 12):
        save_and_retire(kept, run, step)
        newest, damaged = kept.checkpoints.find_verified()
        assert newest is not None
        if step % 2 == 0 and len(steps(kept)) - len(damaged) > 1:
            flip(newest / PART)
            assert kept.checkpoints.find_verified()[0] is not None


def test_nothing_is_deleted_where_nothing_can_be_read(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    kept, lines = retention(config_path, 0, "checkpoint.keep=2")
    save_and_retire(kept, run, 1, 2)

    def fail(_: BinaryIO) -> str:
        raise OSError(116, "Stale file handle", "part.safetensors")

    store(run, 3)
    monkeypatch.setattr(sealed, "_sha256", fail)
    kept.begin()
    kept.finish()
    assert steps(kept) == [1, 2, 3]
    assert "cannot be verified, so nothing is deleted: [Errno 116] Stale file handle" in lines[0]
    monkeypatch.undo()
    save_and_retire(kept, run, 4)
    assert steps(kept) == [3, 4]


@dataclass(frozen=True)
class DamageAfterSave:
    """Once a checkpoint of that step has its name, a bit of it flips."""

    step: int
    rank: int = 0

    def inject(self) -> None:
        original = Path.rename

        def rename(self_: Path, target: Path) -> Path:
            done = original(self_, target)
            if Path(target).name == f"step-{self.step:08d}":
                flip(Path(target) / "part-00000-of-00001.safetensors")
            return done

        Path.rename = rename  # type: ignore[method-assign,assignment]


def test_a_run_whose_disk_damages_between_saves_goes_on_from_what_is_whole(tmp_path: Path, dataset: Path) -> None:
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    two = overrides(checkpoint__keep=2)
    output = launch(1, "--config", str(config), *two, fault=DamageAfterSave(4))  # type: ignore[arg-type]
    assert "step-00000004: damaged: " in output
    flip(checkpoint(run, 6) / "part-00000-of-00001.safetensors")
    output = launch(1, "--config", str(config), *two)
    assert "step 2 of 6" in output
    read_verified(checkpoint(run, 6))


def test_the_best_scored_stay_and_scores_survive(config_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (
        "checkpoint.keep=1",
        "checkpoint.keep_best=2",
        "log.validate_every=1 steps",
        "data.holdout=0.2",
    )
    scores = {1: 0.5, 2: 0.2, 3: float("nan"), 4: 0.4, 5: 0.3, 6: 0.9}
    kept, _ = retention(config_path, 0, *settings)
    for step in (1, 2, 3, 4):
        kept.score(step, {"validation/ema_loss": scores[step], "validation/loss": -scores[step]})
        save_and_retire(kept, run, step)
    assert steps(kept) == [2, 4]
    again, _ = retention(config_path, 4, *settings)
    for step in (5, 6):
        again.score(step, {"validation/ema_loss": scores[step]})
        save_and_retire(again, run, step)
    assert steps(again) == [2, 5, 6]
    back, _ = retention(config_path, 5, *settings)
    assert 6 not in back.scores  # of work that is done again
    assert json.loads((run / "checkpoints" / "scores.json").read_text())["2"]["validation/ema_loss"] == 0.2
    (run / "checkpoints" / "scores.json").write_text("{")
    assert retention(config_path, 6, *settings)[0].scores == {}


def test_the_best_are_the_lowest_and_of_equals_the_newer() -> None:
    values = {1: 0.5, 2: 0.1, 3: 0.5, 4: float("inf")}
    scores = {step: {"m": value} for step, value in values.items()}
    assert best(scores, [1, 2, 3, 4, 5], metric="m", count=9) == [2, 3, 1]
    assert best(scores, [1, 3], metric="m", count=1) == [3]
    assert best(scores, [1, 3], metric="other", count=1) == []


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            ["log.validate_every=2 steps"],
            r'log.validate_every = "2 steps": needs images to validate',
        ),
        (["checkpoint.keep_best=2", "data.holdout=0.2"], r"checkpoint.keep_best = 2: .*set log.validate_every"),
        (
            ["checkpoint.keep_best=1", "data.holdout=0.2", "log.validate_every=24 images"],
            r'checkpoint.every = "2 steps" should be a multiple of log.validate_every = "24 images"',
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(config_path: Path, settings: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as error:
        load_config(config_path, *settings)
    assert "\n" not in str(error.value)
