"""A checkpoint is whole or refused; a damaged one is set aside with the reason; none is ever lost silently."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.harness import assert_same_state, checkpoint, events, launch, overrides, read_verified, write_config
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.run_folder import RunFolder
from trainer.errors import CheckpointError, TrainerError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A finished run of two processes with checkpoints of steps 2, 4 and 6. Copy it before you damage it."""
    folder = tmp_path_factory.mktemp("trained")
    launch(2, "--config", str(write_config(folder, dataset)))
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def at(run: Path) -> Checkpoints:
    return Checkpoints(run / "checkpoints", make_accelerator())


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def part(folder: Path, rank: int) -> Path:
    return folder / f"part-0000{rank}-of-00002.safetensors"


def flip_a_bit(folder: Path) -> None:
    path = part(folder, 1)
    middle = path.stat().st_size // 2
    change(path, middle, bytes([path.read_bytes()[middle] ^ 1]))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (flip_a_bit, "part-00001-of-00002.safetensors differs from its sha256"),
    "zeroed page": (lambda f: change(part(f, 0), 4096, bytes(4096)), "part-00000-of-00002.safetensors differs"),
    "truncation": (lambda f: part(f, 0).write_bytes(part(f, 0).read_bytes()[:-100]), "bytes, the manifest says"),
    "missing part": (lambda f: part(f, 1).unlink(), "part-00001-of-00002.safetensors is missing"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "changed manifest": (lambda f: change(f / "manifest.json", 30, b"9"), "COMPLETE does not belong to this"),
    "missing marker": (lambda f: (f / "COMPLETE").unlink(), "COMPLETE is missing"),
    "stale marker": (
        lambda f: shutil.copy(f.parent / "step-00000002" / "COMPLETE", f / "COMPLETE"),
        "COMPLETE does not belong to this",
    ),
}


@pytest.fixture(scope="module", params=["ddp", "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def trained_by(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Like `trained`, under a strategy."""
    folder = tmp_path_factory.mktemp(request.param)
    launch(2, "--config", str(write_config(folder, dataset)), *overrides(train__strategy=request.param))
    return folder / "run"


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_set_aside_and_fallen_back_from(trained_by: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_by, run)
    inflict, reason = DAMAGES[damage]
    inflict(checkpoint(run, 6))
    newest, damaged = at(run).recover()
    assert newest == checkpoint(run, 4)
    assert reason in damaged[checkpoint(run, 6)]
    assert reason in (run / "checkpoints" / "quarantine" / "step-00000006" / "REASON").read_text()
    assert not checkpoint(run, 6).exists()


def test_training_goes_on_from_the_newest_whole_checkpoint(run: Path, trained: Path, dataset: Path) -> None:
    """The last two are damaged, each in a part that another rank verifies."""
    flip_a_bit(checkpoint(run, 6))
    part(checkpoint(run, 4), 0).unlink()
    output = launch(2, "--config", str(write_config(run.parent, dataset)))
    assert "step 2 of 6" in output
    assert "step-00000006: damaged: part-00001-of-00002.safetensors differs from its sha256" in output
    assert {event["checkpoint"] for event in events(run) if event["event"] == "quarantined"} == {
        "step-00000004",
        "step-00000006",
    }
    assert_same_state(run, trained, 6)


def test_when_all_are_damaged_nothing_starts_anew(run: Path, dataset: Path) -> None:
    config = write_config(run.parent, dataset)
    for step in (2, 4, 6):
        flip_a_bit(checkpoint(run, step))
    for _ in range(2):  # the second time there is only the quarantine to tell
        output = launch(1, "--config", str(config), expect=2)
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert "no checkpoint is whole, 3 in quarantine/" in line
        assert "Traceback" not in output
    assert len(list((run / "checkpoints" / "quarantine").glob("*/part-*"))) == 6
    assert not [event for event in events(run) if event["event"] == "started"][1:]


def test_resume_none_does_not_mix_runs(run: Path, dataset: Path) -> None:
    output = launch(1, "--config", str(write_config(run.parent, dataset)), "--resume", "none", expect=2)
    assert "holds checkpoints of an earlier run" in output


def test_going_back_sets_newer_checkpoints_aside(run: Path, trained: Path, dataset: Path) -> None:
    config = write_config(run.parent, dataset)
    launch(2, "--config", str(config), "--resume", str(checkpoint(run, 2)))
    assert sorted(p.name for p in (run / "checkpoints" / "superseded").iterdir()) == ["step-00000004", "step-00000006"]
    assert_same_state(run, trained, 6)
    damaged = run / "checkpoints" / "superseded" / "step-00000004"
    flip_a_bit(damaged)
    output = launch(1, "--config", str(config), "--resume", str(damaged), expect=2)
    assert "step-00000004: damaged: part-00001" in output


def test_going_back_to_what_was_set_aside(run: Path, trained: Path, dataset: Path) -> None:
    """A superseded checkpoint, and then an older one of another folder, win over newer ones of the run."""
    config = write_config(run.parent, dataset)
    launch(2, "--config", str(config), "--resume", str(checkpoint(run, 2)))
    aside = run / "checkpoints" / "superseded" / "step-00000004"
    launch(2, "--config", str(config), "--resume", str(aside))
    assert_same_state(run, trained, 6)
    keep_one = overrides(checkpoint__keep=1)
    launch(2, "--config", str(config), "--resume", str(checkpoint(trained, 2)), *keep_one)
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000006"]
    assert [event["step"] for event in events(run) if event["event"] == "started"] == [0, 2, 4, 2]
    assert_same_state(run, trained, 6)


def test_a_file_system_that_fails_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: BinaryIO) -> str:
        raise OSError(116, "Stale file handle", "part.safetensors")

    monkeypatch.setattr("trainer.engine.checkpointing.sealed._sha256", fail)
    with pytest.raises(CheckpointError, match=r"step-00000006: cannot be verified: .*Stale file handle"):
        at(run).recover()
    assert checkpoint(run, 6).exists()
    assert not (run / "checkpoints" / "quarantine").exists()


def test_one_job_trains_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one waits a little for the first to end, then is refused; a dead one's lock is free."""
    monkeypatch.setattr("trainer.engine.run_folder._PATIENCE_SECONDS", 0.5)
    holder = os.fork()
    if holder == 0:
        first = RunFolder(tmp_path, writes=True)
        first.claim()
        time.sleep(60)
        os._exit(first.path != tmp_path)
    second = RunFolder(tmp_path, writes=True)
    try:
        while not (tmp_path / "lock").exists() or f"process {holder}" not in (tmp_path / "lock").read_text():
            time.sleep(0.05)
        with pytest.raises(TrainerError, match=rf"another job trains there \(process {holder} on "):
            second.claim()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    second.claim()
    assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()


def test_another_run_is_refused_with_the_differences(run: Path, dataset: Path) -> None:
    config = str(write_config(run.parent, dataset))
    changed = overrides(seed=4, model__dropout=0.5, train__ema_decay=0.5)
    output = launch(1, "--config", config, *changed, expect=2)
    assert "model.dropout: 0.1 in the checkpoint, 0.5 now; seed: 3 in the checkpoint, 4 now;" in output
    assert "ema_decay" not in output  # may change within a run


def test_what_may_change_is_told(run: Path, dataset: Path) -> None:
    config = str(write_config(run.parent, dataset))
    changed = overrides(train__ema_decay=0.5, train__duration="7 steps")
    output = launch(1, "--config", config, *changed)
    assert "changed since the last start: train.ema_decay: 0.9 -> 0.5" in output
    (event,) = [event for event in events(run) if event["event"] == "configuration"]
    assert event["changes"][0].startswith("run_dir: ")  # the fixture's run was copied
    assert event["changes"][1:] == ["train.duration: 6 steps -> 7 steps", "train.ema_decay: 0.9 -> 0.5"]
    assert "changed since" not in launch(1, "--config", config, *changed)


def test_retention_keeps_the_newest_and_every_nth(tmp_path: Path, dataset: Path) -> None:
    keep = overrides(checkpoint__keep=2, checkpoint__every="1 steps", checkpoint__keep_every="24 images")
    launch(1, "--config", str(write_config(tmp_path, dataset)), *keep, *overrides(train__duration="8 steps"))
    kept = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [3, 6, 7, 8]  # 24 images are three steps of 8


def test_parts_are_balanced_and_hold_each_tensor_once(trained: Path) -> None:
    from safetensors import safe_open

    folder = checkpoint(trained, 6)
    names: list[list[str]] = []
    for rank in range(2):
        with safe_open(part(folder, rank), framework="pt") as opened:
            names.append(list(opened.keys()))
    _, manifest = read_verified(folder)
    assert sorted(names[0] + names[1]) == sorted(manifest["tensors"])
    small, large = sorted(part(folder, rank).stat().st_size for rank in range(2))
    assert large < 1.2 * small
