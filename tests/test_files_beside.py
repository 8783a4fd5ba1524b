"""Files beside the checkpoints, with whatever bytes and on whatever disk: they neither stop a run nor mute it."""

import json
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from launch import preflight, status
from tests.harness import checkpoint, events, launch, load_config, logged, overrides, write_config
from tests.test_metrics import tensorboard_steps
from trainer.engine.checkpointing.scores import read_scores
from trainer.engine.run_folder import RunFolder
from trainer.reporting.page import render
from trainer.reporting.run_files import read_run
from trainer.telemetry.goodput import add_up, read_events
from trainer.telemetry.heartbeat import read_heartbeat
from trainer.telemetry.metrics import Metrics, read_metrics
from trainer.telemetry.progress import Progress
from trainer.telemetry.trackers import Trackers

Damage = Callable[[Path], object]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def become(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def be_a(make: Damage) -> Damage:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


DAMAGES: dict[str, Damage] = {
    "a flipped bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": become(b""),
    "zeros after a power failure": lambda path: path.write_bytes(path.read_bytes() + bytes(4096)),
    "zeros alone": become(bytes(5000)),
    "null": become(b"null\n"),
    "a list": become(b"[1, 2]\n"),
    "numbers for texts": become(b'{"step": 3, "time": 3, "event": 7, "activity": 1, "host": 2, "seconds": 5}\n'),
    "texts for numbers": become(b'{"step": "3", "time": "3", "event": "started", "activity": "a", "seconds": "x"}\n'),
    "numbers without end": become(
        b'{"step": 1e999, "time": -1e999, "event": "started", "2": {"a": 1' + b"0" * 400 + b"}}"
    ),
    "NaN": become(b'{"step": NaN, "time": NaN, "event": "started", "train/loss": NaN, "2": {"a": null}}\n'),
    "nested without end": become(b"[" * 200_000),
    "UTF-16": become('{"step": 1, "event": "started"}\n'.encode("utf-16")),
    "missing": lambda path: path.unlink(),
    "a folder": be_a(lambda path: path.mkdir()),
    "a link to nowhere": be_a(lambda path: path.symlink_to("nowhere")),
    "a link to itself": be_a(lambda path: path.symlink_to(path)),
    "a pipe": be_a(os.mkfifo),
}
SCORED = overrides(data__holdout=0.2, log__validate_every="2 steps")
BESIDE = ["events.jsonl", "logs/metrics.jsonl", "heartbeat.json", "checkpoints/scores.json", "DONE", "STOPPED"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Six steps, with everything that a run writes beside its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    launch(1, "--config", str(write_config(folder, dataset)), *SCORED)
    run = folder / "run"
    (run / "STOPPED").write_text("step 6\n")
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", BESIDE)
def test_whatever_a_file_holds_it_is_passed_over(
    run: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by status, then read and written by a start."""
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM
    DAMAGES[damage](run / name)
    config = load_config(run / "config.toml", f"run_dir={run}")
    assert status.describe(run, verify=False)["checkpoint"].startswith("step 6")
    assert preflight.is_finished(config) == (name != "DONE" or damage == "zeros after a power failure")
    read_scores(run / "checkpoints")
    said: list[str] = []
    folder = RunFolder(run, writes=True, say=said.append)
    folder.begin(config)
    folder.event("started", step=6)
    folder.mark(folder.done, 6)
    metrics = Metrics(folder.logs, 6, say=said.append)
    metrics.scalars(7, {"train/loss": 0.25})
    metrics.close()
    add_up(read_events(run), read_heartbeat(run)).scalars()
    assert all("\n" not in line and str(run) in line for line in said)
    if not said:  # then all of it was written
        assert read_metrics(folder.logs)[-1] == {"step": 7, "train/loss": 0.25}
        assert read_events(run)[-1]["event"] == "started"
        assert (run / "DONE").read_text() == "step 6\n"


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_report_is_written_whatever_the_files_hold(run: Path, damage: str) -> None:
    for name in BESIDE:
        DAMAGES[damage](run / name)
    assert "step-00000006" in render(read_run(run)) or "all files there" in render(read_run(run))


def test_a_run_goes_on_and_logs_though_all_of_them_are_damaged(run: Path, dataset: Path) -> None:
    for name in [*BESIDE, "config.toml"]:
        flip_a_bit(run / name)
    config = str(write_config(run.parent, dataset))
    output = launch(1, "--config", config, *SCORED, *overrides(train__duration="8 steps"))
    assert "Traceback" not in output
    assert f"{run}/config.toml: cannot be read" in output
    assert f"{run}/logs/metrics.jsonl: 1 of 6 lines cannot be read and count for nothing" in output
    assert [record["step"] for record in read_metrics(run / "logs")][-2:] == [7, 8]
    assert [event["event"] for event in read_events(run)][-1] == "finished"
    assert (run / "DONE").read_text() == "step 8\n"


def test_folders_in_the_place_of_files_mute_only_those(run: Path, dataset: Path) -> None:
    for name in [*BESIDE, "config.toml"]:
        (run / name).unlink()
        (run / name).mkdir()
    shutil.rmtree(run / "logs")
    (run / "logs").write_text("a file")
    config = str(write_config(run.parent, dataset))
    output = launch(1, "--config", config, *SCORED, *overrides(train__duration="8 steps"))
    assert "Traceback" not in output
    for name in ("events.jsonl", "logs/metrics.jsonl", "heartbeat.json", "config.toml", "DONE"):
        (line,) = [line for line in output.splitlines() if line.startswith(f"{run / name}: cannot be written")]
        assert "the run goes on" in line
    assert checkpoint(run, 8).exists()


def test_zeros_that_a_power_failure_left_hide_no_line_that_follows(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for name in ("started", "stopped"):
        RunFolder(tmp_path, writes=True).event(name)
        path.write_bytes(path.read_bytes() + bytes(4096))
    assert [event["event"] for event in read_events(tmp_path)] == ["started", "stopped"]


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel writes what fits and refuses the rest, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_did_not_take_is_written_later(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    metrics = Metrics(tmp_path, 0, say=said.append)
    metrics.scalars(1, {"loss": 1.0})
    with files_limited_to(40):  # a line fits and a half
        for step in (2, 3, 4):
            metrics.scalars(step, {"loss": 1.0})
            metrics.picture(step, "samples", np.zeros((4, 5, 3), dtype=np.uint8))
        metrics.scalars(4, {"validation": 0.5})
        full = (tmp_path / "metrics.jsonl").read_bytes()
    assert full == b'{"step": 1, "loss": 1.0}\n'
    metrics.scalars(5, {"loss": 1.0})
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[3] == {"step": 4, "loss": 1.0, "validation": 0.5}
    assert tensorboard_steps(tmp_path, "loss") == [1, 2, 3, 4, 5]
    assert [line.partition(" (")[0].partition("; ")[0] for line in said] == [
        f"{tmp_path}/{name}: {what}"
        for what in ("cannot be written", "is written again")
        for name in ("events.out.tfevents", "metrics.jsonl")
    ]
    assert "Traceback" not in capfd.readouterr().err


def test_the_journal_tells_of_a_full_disk_when_it_is_not_any_more(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True, say=lambda _: None)
    folder.event("started", step=0)
    with files_limited_to((tmp_path / "events.jsonl").stat().st_size + 20):
        folder.event("checkpoint_failed", step=2)
    folder.event("checkpoint", step=4)
    assert [event["event"] for event in events(tmp_path)] == ["started", "checkpoint_failed", "checkpoint"]


def test_a_marker_waits_for_a_disk_that_is_full_for_a_moment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True, say=lambda _: None)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    relief = threading.Timer(0.7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, unlimited))
    with files_limited_to(0):
        relief.start()
        folder.mark(folder.done, 6)
    assert folder.done.read_text() == "step 6\n"
    assert [path.name for path in tmp_path.iterdir()] == ["DONE"]


def test_half_a_configuration_is_never_seen(run: Path) -> None:
    said: list[str] = []
    config, before = load_config(run / "config.toml", "seed=3"), (run / "config.toml").read_text()
    with files_limited_to(100):
        RunFolder(run, writes=True, say=said.append).begin(config)
    assert (run / "config.toml").read_text() == before
    assert said[0].startswith(f"{run}/config.toml: cannot be written (File too large)")


def test_an_output_that_takes_nothing_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(total=1, done=0, unit="step", title="training", visible=True)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        progress.say("a line")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):  # it was full
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


class Leaving:
    """A tracker that ends the interpreter."""

    name = "leaving"

    def log(self, values: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        raise SystemExit(3)


def test_a_tracker_that_leaves_at_the_end_does_not_take_the_run_along(tmp_path: Path) -> None:
    said: list[str] = []
    Metrics(tmp_path, 0, Trackers([Leaving()], said.append)).close()  # type: ignore[list-item]
    assert said == ["log.trackers: leaving has failed and is told no more: 3"]


def test_scores_that_cannot_be_read_are_those_that_were_logged(run: Path) -> None:
    before = read_scores(run / "checkpoints")
    assert sorted(before) == [2, 4, 6]
    path = run / "checkpoints" / "scores.json"
    path.write_text("{")
    assert read_scores(run / "checkpoints") == before
    path.write_text('{"2": {"validation/loss": null, "validation/ema_loss": 0.5}, "x": {}, "4": 7}')
    assert read_scores(run / "checkpoints") == {2: {"validation/ema_loss": 0.5}}


def test_losses_are_logged_through_it_all(trained: Path) -> None:
    assert sorted(logged(trained)) == [1, 2, 3, 4, 5, 6]
