"""DONE, STOPPED and exit code 0 speak of a state that is saved; a run that has been somewhere does not start anew."""

import errno
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch import preflight
from tests.harness import checkpoint, events, launch, load_config, logged, overrides, write_config
from trainer.engine.checkpointing import async_save as saving
from trainer.engine.checkpointing.lost_checkpoints import check_that_it_is_new
from trainer.engine.run_dir import check_run_dir
from trainer.engine.run_folder import RunFolder, check_identity
from trainer.engine.step.train_step import TrainStep
from trainer.errors import CheckpointError, ConfigError

CONTINUE = overrides(checkpoint__on_failure="continue")


@dataclass(frozen=True)
class FullDisk:
    """Every part of a checkpoint from the `first`-th on meets a full disk; in step `stop` comes a SIGTERM."""

    first: int = 1
    stop: int = 0
    rank: int = 0

    def inject(self) -> None:
        write, update = saving._write_part, TrainStep.update
        parts = steps = 0

        def full(*arguments: Any) -> Any:
            nonlocal parts
            parts += 1
            if parts >= self.first:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*arguments)

        def stopped(*arguments: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == self.stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*arguments, **named)

        saving._write_part = full
        TrainStep.update = stopped  # type: ignore[method-assign]


@pytest.mark.parametrize(("stop", "marker"), [(0, "DONE"), (3, "STOPPED")])
def test_no_end_is_claimed_that_is_not_saved(tmp_path: Path, dataset: Path, stop: int, marker: str) -> None:
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    fault: Any = FullDisk(stop=stop)
    output = launch(1, "--config", str(config), *CONTINUE, fault=fault, expect=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "cannot be written: [Errno 28] No space left on device; the run ends at step" in line
    assert line.endswith("nothing is saved")
    assert not (run / marker).exists()
    assert not {"finished", "stopped"} & {event["event"] for event in events(run)}
    assert not preflight.is_finished(load_config(config))


def test_the_last_save_is_tried_again_and_what_was_saved_before_is_named(tmp_path: Path, dataset: Path) -> None:
    config = str(write_config(tmp_path, dataset))
    fault: Any = FullDisk(first=2)
    output = launch(1, "--config", config, *CONTINUE, fault=fault, expect=2)
    assert "the run ends at step 6, and step 2 is the last that is saved" in output
    launch(1, "--config", config, *CONTINUE)
    assert (tmp_path / "run" / "DONE").read_text() == "step 6\n"


@dataclass(frozen=True)
class Vanish:
    """In the fourth step the run's folder is moved away."""

    run: Path
    rank: int = 0

    def inject(self) -> None:
        update = TrainStep.update
        steps = 0

        def gone(*arguments: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 4:
                self.run.rename(self.run.with_name("elsewhere"))
            return update(*arguments, **named)

        TrainStep.update = gone  # type: ignore[method-assign]


@pytest.mark.parametrize(("processes", "settings"), [(1, ["100 steps", "false"]), (2, ["1 steps", "true"])])
def test_a_folder_that_vanishes_ends_the_run_and_is_not_made_anew(
    tmp_path: Path, dataset: Path, processes: int, settings: list[str]
) -> None:
    """Noticed when a checkpoint is due; or when a line is logged, if not by the save that was under way."""
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    every, background = settings
    settings = overrides(train__duration="10 steps", log__every=every)
    settings += overrides(checkpoint__every="3 steps", checkpoint__background=background)
    fault: Any = Vanish(run)
    output = launch(processes, "--config", str(config), *settings, fault=fault, expect=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: run_dir = {run}: has vanished while the run was training")
    assert "Traceback" not in output
    assert not run.exists()
    assert checkpoint(tmp_path / "elsewhere", 3).exists() or background == "true"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    launch(1, "--config", str(write_config(folder, dataset)))
    return folder / "run"


@pytest.fixture
def lost(trained: Path, tmp_path: Path) -> Path:
    """A run of which everything is there but its checkpoints."""
    run = shutil.copytree(trained, tmp_path / "run")
    for path in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    return run


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(lost: Path, dataset: Path) -> None:
    config = str(write_config(lost.parent, dataset))
    before = logged(lost)
    assert not preflight.is_finished(load_config(lost.parent / "run.toml"))  # a job must not believe DONE
    output = launch(1, "--config", config, expect=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert f"run_dir = {lost}: events.jsonl tells of a checkpoint of step 6, but checkpoints/ holds none" in line
    assert "--resume PATH or URL" in line
    assert "--resume none" in line
    assert logged(lost) == before
    assert (lost / "DONE").exists()
    launch(
        1, "--config", config, "--resume", "none", *overrides(train__duration="1 steps", checkpoint__every="0 steps")
    )
    assert [event["step"] for event in events(lost) if event["event"] == "started"] == [0, 0]
    assert sorted(logged(lost)) == [1]


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        (["heartbeat.json", "DONE", "logs"], "events.jsonl tells of a checkpoint of step 6"),
        (["events.jsonl"], "DONE tells that step 6 was saved"),
        (["events.jsonl", "DONE"], "heartbeat.json tells that step 6 was saved"),
        (["events.jsonl", "DONE", "heartbeat.json"], "the logs tell of step 6, and events.jsonl, .* is gone"),
    ],
)
def test_whatever_is_left_tells_of_the_checkpoints(lost: Path, gone: list[str], told: str) -> None:
    for name in gone:
        path = lost / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=told):
        check_that_it_is_new(RunFolder(lost, writes=True))


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(lost: Path) -> None:
    folder = RunFolder(lost, writes=True)
    for name in ("DONE", "heartbeat.json", "events.jsonl"):
        (lost / name).unlink()
    folder.event("started", step=0, resumed_from="")
    metrics = lost / "logs" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:4]))  # the checkpoint of step 2 may be on its way
    check_that_it_is_new(folder)
    metrics.write_text("".join(lines[:5]))  # it is complete before that of step 4 is begun
    with pytest.raises(CheckpointError, match=r'the logs tell of step 5 with checkpoint.every = "2 steps"'):
        check_that_it_is_new(folder)
    metrics.unlink()
    folder.event("started", step=0, resumed_from="/elsewhere/step-00000000")
    with pytest.raises(CheckpointError, match="went on from /elsewhere/step-00000000"):
        check_that_it_is_new(folder)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("anybody's")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["thesis.txt"],
        ["config.toml"],
        ["checkpoints/epoch=3.ckpt"],
        ["lock"],
        ["logs/events.out.tfevents.1"],
        ["DONE"],
        ["a/b", "c", "d", "e"],
    ],
)
def test_a_folder_with_other_things_is_refused_as_it_is(tmp_path: Path, names: list[str]) -> None:
    folder = fill(tmp_path / "mine", *names)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"run_dir = .*/mine: holds '.*but no run.*; choose a folder"):
        RunFolder(folder, writes=True).claim()
    assert sorted(folder.rglob("*")) == before
    assert all(path.is_dir() or path.read_text() == "anybody's" for path in before)


def test_a_folder_that_may_be_a_runs_is_taken(tmp_path: Path, trained: Path) -> None:
    check_run_dir(tmp_path / "new")
    check_run_dir(tmp_path)
    check_run_dir(
        fill(tmp_path / "logged", "nohup.out", "train.log", "my.toml", ".DS_Store", "slurm/1.out", "flight/rank-0")
    )
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    check_run_dir(tmp_path / "disk")
    for kept in ("config.toml", "events.jsonl", "heartbeat.json", "checkpoints"):
        run = fill(tmp_path / f"only {kept}", "notes.txt")
        source = trained / kept
        shutil.copytree(source, run / kept) if source.is_dir() else shutil.copy(source, run / kept)
        check_run_dir(run)
    with pytest.raises(ConfigError, match=r"notes\.txt: is no folder"):
        check_run_dir(run / "notes.txt")


def test_a_foreign_folder_is_refused_before_anything_is_made_there(tmp_path: Path, dataset: Path) -> None:
    foreign = fill(tmp_path / "run", "thesis.txt", "config.toml")
    output = launch(1, "--config", str(write_config(tmp_path, dataset)), expect=2)
    assert f"error: run_dir = {foreign}: holds 'config.toml', 'thesis.txt' but no run" in output
    assert sorted(path.name for path in foreign.iterdir()) == ["config.toml", "thesis.txt"]


@pytest.mark.parametrize("name", ["", "  ", "a\\u0000b"])
def test_what_is_no_path_is_refused(config_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run_dir = .*: should be the path of a folder"):
        load_config(config_path, f'run_dir="{name}"')


def test_a_field_that_came_later_has_had_its_default() -> None:
    saved = {"model.channels": 3, "seed": 0}
    check_identity(saved, {**saved, "model.norm_groups": 32, "diffusion.schedule": "linear"}, "step-2")
    with pytest.raises(CheckpointError, match=r"model.norm_groups: 32 in the checkpoint, 8 now;"):
        check_identity(saved, {**saved, "model.norm_groups": 8}, "step-2")
    with pytest.raises(CheckpointError, match=r"model.image_size: None in the checkpoint, 64 now;"):
        check_identity(saved, {**saved, "model.image_size": 64}, "step-2")  # which has no default
    with pytest.raises(CheckpointError, match=r"data.samples: None in the checkpoint, 9 now;"):
        check_identity(saved, {**saved, "data.samples": 9}, "step-2")  # no field at all
    with pytest.raises(CheckpointError, match=r"model.kind: ddpm-unet in the checkpoint, other now;"):
        check_identity(saved, {**saved, "model.kind": "other"}, "step-2")  # saved when there was one kind
