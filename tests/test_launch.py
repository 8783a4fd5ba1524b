"""What surrounds a job, without SLURM: checks before it, snapshots, its status, where its time went."""

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import preflight, status, submit
from launch.grace import seconds_to_stop
from launch.interface import interface_addresses, interface_to
from launch.outlook import Outlook, measured_outlook, parse_time, stretches
from launch.snapshot import take_snapshot
from tests.faults import Fault
from tests.harness import REPOSITORY, checkpoint, events, launch, load_config, overrides, write_config
from tests.stored import write_checkpoint
from trainer.config import Config
from trainer.engine.run_folder import RunFolder
from trainer.errors import ConfigError
from trainer.telemetry.goodput import PARTS, add_up, read_events
from trainer.telemetry.heartbeat import read_heartbeat
from trainer.units import in_words


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run that was killed in its sixth step, went on from its last checkpoint, and was stopped a few steps later."""
    folder = tmp_path_factory.mktemp("died")
    arguments = ["--config", str(write_config(folder, dataset)), *overrides(train__duration="20 steps")]
    launch(1, *arguments, fault=Fault(action="kill", point="device_batch", call=6, rank=0), expect=None)
    launch(1, *arguments, fault=Fault(action="stop", point="device_batch", call=3, rank=0))
    return folder / "run"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400), ("1-00:00:01", 86401)],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


def test_an_outlook_counts_the_jobs_that_a_run_will_take() -> None:
    outlook = Outlook(images_left=1_000_000, images_per_second=100.0, world_size=8)
    assert outlook.seconds_on(8) == 10_000
    assert outlook.seconds_on(16) == 5_000
    assert stretches(10_000, limit=3600, grace=100) == 3
    assert [in_words(seconds) for seconds in (8, 720, 97200, 273600)] == ["8 s", "12 min", "1 d 3 h", "3 d 4 h"]


def test_grace_is_what_a_stop_can_take(config_path: Path) -> None:
    """By hand: 30 s, two steps, two saves of three passes, ten that are read again, two copies at a fifth."""
    config = load_config(config_path)  # which keeps 10
    assert seconds_to_stop(config, 2 * 10**9) == 120  # 30 + 24 + 40
    assert seconds_to_stop(config, 20 * 10**9, step_seconds=10) == 690  # 30 + 20 + 240 + 400
    copied = load_config(config_path, "checkpoint.copy_to=memory://copies")
    assert seconds_to_stop(copied, 20 * 10**9) == 1080  # 30 + 240 + 400 + 400, rounded up


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--gpus", "0", "--processes", "3", "--time", "10"],
            "train.global_batch = 8: is not divisible by 6 processes",
        ),
        (["--gpus", "1", "--time", "2"], "--time 2: is not longer than the 120 s of --grace"),
        (["--gpus", "1", "--time", "soon"], "--time soon: should be minutes, H:M:S or D-H:M:S"),
        (["--gpus", "1", "--time", "10", "--set", "data.path=/nowhere"], "/nowhere: no such folder"),
        (["--gpus", "1", "--time", "10", "--set", "train.batch=8"], "train.batch: unknown key"),
    ],
)
def test_a_run_that_cannot_begin_is_not_submitted(
    config_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(submit, "_slurm", lambda *_: pytest.fail("SLURM was asked"))
    monkeypatch.setattr(sys, "argv", ["submit.py", str(config_path), "--nodes", "2", *arguments])
    assert submit.main() == 2
    assert words in capsys.readouterr().err
    assert not (config_path.parent / "run").exists()


def test_a_snapshot_is_what_git_can_bring_back(config_path: Path) -> None:
    """Two in one second do not mix; the configuration is read again as it was."""
    config = load_config(config_path, "train.duration=9 steps")
    one, other = take_snapshot(config), take_snapshot(config)
    assert one != other
    assert Config.load(one / "config.toml") == config
    assert preflight.revision() in (one / "revision.txt").read_text()
    assert (one / "changes.diff").read_text() == (preflight.git("diff", "--binary", "HEAD") or "")


def test_the_interface_is_the_one_that_leads_there() -> None:
    """The loopback is nobody's way to another machine."""
    assert "127.0.0.1" in interface_addresses()
    assert interface_to("127.0.0.1") != "lo"
    for address, name in interface_addresses().items():
        if name != "lo":
            assert interface_to(address) == name


def test_finished_means_the_whole_duration(died: Path, tmp_path: Path) -> None:
    run = shutil.copytree(died, tmp_path / "run")
    config = load_config(run / "config.toml", f"run_dir={run}")
    assert not preflight.is_finished(config)
    (run / "DONE").write_text("step 20\nattempt 4711.0\n")
    assert not preflight.is_finished(config)  # what it speaks of is not there
    write_checkpoint(run / "checkpoints", {}, step=20)
    assert preflight.is_finished(config)
    assert not preflight.is_finished(load_config(run / "config.toml", f"run_dir={run}", "train.duration=21 steps"))


def test_the_journal_adds_up(died: Path) -> None:
    """The second start tells of the first, which left a heartbeat and no word of its end."""
    goodput = add_up(read_events(died), read_heartbeat(died))
    assert (goodput.starts, goodput.stopped, goodput.died) == (2, 1, 1)
    first, second = [event for event in events(died) if event["event"] == "started"]
    assert second["step"] in (2, 4)  # the second save may be on its way when the kill comes
    assert 0 <= second["lost_steps"] <= 5 - second["step"]  # the heartbeat is as old as the last activity
    assert goodput.lost_steps == second["lost_steps"]
    (stopped,) = [event for event in events(died) if event["event"] == "stopped"]
    assert stopped["seconds"]["saving"] > 0
    # From the first process's start to the last sign of life, nothing is left out and nothing counted twice.
    total = stopped["time"] - (first["time"] - first["startup_seconds"])
    assert goodput.total == pytest.approx(total, abs=1.0)
    assert goodput.seconds["waiting"] >= 0


def test_the_logged_parts_add_up_to_the_clock_on_the_wall(died: Path) -> None:
    """TensorBoard's own clock, over a death and a restart."""
    first = next(event for event in events(died) if event["event"] == "started")
    began = first["time"] - first["startup_seconds"]
    board = EventAccumulator(str(died / "logs"))
    board.Reload()
    wall = board.Scalars("goodput/wall_seconds")
    assert len(wall) == len(metrics(died))
    for scalar, row in zip(wall, metrics(died), strict=True):
        assert scalar.step == row["step"]
        assert scalar.value == pytest.approx(scalar.wall_time - began, abs=1.0)
        assert sum(row[f"goodput/{part}"] for part in PARTS) == pytest.approx(1.0)
    last = metrics(died)[-1]
    for part in ("training", "data", "startup", "saving", "waiting"):
        assert last[f"goodput/{part}"] > 0
    second = [event for event in events(died) if event["event"] == "started"][1]
    assert (last["goodput/redone"] > 0) == (second["lost_steps"] > 0)


def test_what_a_fault_threw_away_is_no_goodput() -> None:
    start = {"event": "started", "startup_seconds": 10.0}
    seconds = {"startup": 10.0, "training": 100.0, "data": 8.0, "saving": 5.0}
    journal = [
        {**start, "time": 1010.0, "step": 0},
        {**start, "time": 1200.0, "step": 75, "lost_steps": 25, "last_seen": 1123.0, "seconds_before": seconds},
    ]
    beat = {"time": 1250.0, "step": 120, "seconds": {"startup": 10.0, "training": 50.0}}
    goodput = add_up(journal, beat)
    assert goodput.seconds == pytest.approx(
        {"startup": 20.0, "training": 125.0, "data": 6.0, "redone": 27.0, "saving": 5.0, "waiting": 67.0}
    )
    assert goodput.share("training") == pytest.approx(0.5)
    assert goodput.scalars()["goodput/redone"] == pytest.approx(27 / 250)
    assert goodput.scalars()["goodput/wall_seconds"] == 250.0


def test_a_stopped_run_on_one_screen(died: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM
    rows = status.describe(died)
    assert rows["state"] == "stopped on request, saved; start it again to go on"
    assert "of 20 (" in rows["step"]
    assert "; verified, " in rows["checkpoint"]
    assert rows["starts"].startswith("2, of which 1 were stopped on request and 1 died")
    assert " training " in f" {rows['time']}"
    outlook = measured_outlook(load_config(died / "config.toml"))
    assert outlook is not None
    assert outlook.images_left == 8 * (20 - max(int(row["step"]) for row in metrics(died)))
    assert " of training on 1 processes; " in rows["ETA"]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_damage_death_and_silence_are_told(died: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = shutil.copytree(died, tmp_path / "run")
    newest = max((run / "checkpoints").glob("step-*"))
    part = next(newest.glob("part-*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert "DAMAGED: part-00000-of-00001.safetensors differs from its sha256" in status.describe(run)["checkpoint"]
    assert "DAMAGED" not in status.describe(run, verify=False)["checkpoint"]

    beat = {**(read_heartbeat(run) or {}), "activity": "saving", "time": time.time() - 300}
    (run / "heartbeat.json").write_text(json.dumps(beat))
    (run / "STOPPED").unlink()
    assert status.describe(run)["state"].startswith("DEAD: last seen 5 min")
    # As long as the lock is held, it is not dead; another process must ask, for a process does not see its own locks.
    owner = RunFolder(run, writes=True)
    owner.claim()
    said = launch_status(run)
    assert f"saving on {socket.gethostname()}, but SILENT for 5 min" in said
    (run / "heartbeat.json").write_text(json.dumps({**beat, "time": time.time()}))
    assert f"saving on {socket.gethostname()}, seen " in launch_status(run)


def launch_status(run: Path) -> str:
    import subprocess

    command = [sys.executable, "launch/status.py", str(run)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.toml"):
        status.describe(tmp_path)


def test_no_checkpoint_no_log_no_crash(config_path: Path) -> None:
    """A run that was submitted and has not begun."""
    take_snapshot(load_config(config_path))
    rows = status.describe(config_path.parent / "run")
    assert rows["state"].startswith("not started yet")
    assert rows["checkpoint"] == "none yet"
    assert checkpoint(config_path.parent / "run", 2).exists() is False
