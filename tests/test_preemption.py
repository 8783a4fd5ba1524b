"""Signals that ask to stop: to one rank, to all of a job's processes, and while it is not training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.faults import Fault
from tests.harness import (
    REPOSITORY,
    assert_same_state,
    checkpoint,
    environment,
    events,
    launch,
    logged,
    overrides,
    read_verified,
    write_config,
)

ENDLESS = overrides(train__duration="100k steps", checkpoint__every="50 steps")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Six steps on two processes."""
    folder = tmp_path_factory.mktemp("preempted")
    launch(2, "--config", str(write_config(folder, dataset)))
    return folder / "run"


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, dataset: Path, run: Path, rank: int) -> None:
    arguments = ("--config", str(write_config(tmp_path, dataset)))
    launch(2, *arguments, fault=Fault(action="stop", point="device_batch", call=3, rank=rank))
    stopped = tmp_path / "run"
    assert (stopped / "STOPPED").read_text() == "step 4\n"  # the next step is under way when the signal is agreed on
    assert not (stopped / "DONE").exists()
    assert read_verified(checkpoint(stopped, 4))[1]["world_size"] == 2
    launch(2, *arguments)
    assert not (stopped / "STOPPED").exists()
    assert (stopped / "DONE").read_text() == "step 6\n"
    assert_same_state(stopped, run, 6)
    assert logged(stopped) == logged(run)


def test_a_signal_during_a_save(tmp_path: Path, dataset: Path, run: Path) -> None:
    """The save is finished, the steps under way are made, and they are saved, too."""
    arguments = ("--config", str(write_config(tmp_path, dataset)))
    launch(2, *arguments, fault=Fault(action="stop", point="write_part", call=1, rank=1))
    stopped = tmp_path / "run"
    assert [event["step"] for event in events(stopped) if event["event"] == "checkpoint"] == [2, 4]
    launch(2, *arguments)
    assert not [event for event in events(stopped) if event["event"] == "quarantined"]
    assert_same_state(stopped, run, 6)


@pytest.mark.parametrize("point", ["save_png", pytest.param("work_part", marks=pytest.mark.slow)])
def test_a_signal_during_sampling(tmp_path: Path, run: Path, point: str) -> None:
    """To one rank of two, in the first of its batches: no rank begins another one, and the same command goes on."""
    output = "folder" if point == "save_png" else "npz"
    arguments = ("--run", str(run), "--n", "24", "--batch", "2", "--format", output)
    fault = Fault(action="stop", point=point, call=1, rank=1)
    said = launch(2, *arguments, "--out", str(tmp_path / "stopped"), script="sample", fault=fault)
    (line,) = [line for line in said.splitlines() if line.startswith("stopped by SIGTERM: ")]
    there = int(line.removeprefix("stopped by SIGTERM: ").split()[0])
    assert 2 <= there < 24
    assert line.endswith(f"of 24 images are done, in {tmp_path / 'stopped'}; the same command goes on")
    assert not (tmp_path / "stopped" / "samples.npz").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").glob("0*.png")}
    assert len(kept) == (there if output == "folder" else 0)

    launch(1, *arguments, "--out", str(tmp_path / "stopped"), script="sample")
    launch(2, *arguments, "--out", str(tmp_path / "whole"), script="sample")
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    names = ["samples.npz"] if output == "npz" else ["grid.png", *(f"{number:06d}.png" for number in range(24))]
    for name in names:
        one, other = (read(tmp_path / folder / name) for folder in ("stopped", "whole"))
        assert np.array_equal(one, other)
    left_over = {path.name for path in (tmp_path / "stopped").iterdir()} - {*names, "request.json"}
    assert not left_over


def read(path: Path) -> np.ndarray:
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return arrays["arr_0"]
    return np.asarray(Image.open(path))


def test_a_signal_during_an_evaluation(tmp_path: Path, run: Path) -> None:
    arguments = ("bpd", "--run", str(run), "--batch", "2")
    fault = Fault(action="stop", point="work_part", call=2, rank=0)
    said = launch(2, *arguments, "--out", str(tmp_path / "stopped"), script="evaluate", fault=fault)
    assert "of 21 images are done, in " in said
    assert not (tmp_path / "stopped" / "bpd.json").exists()
    launch(2, *arguments, "--out", str(tmp_path / "stopped"), script="evaluate")
    launch(2, *arguments, "--out", str(tmp_path / "whole"), script="evaluate")
    assert (tmp_path / "stopped" / "terms.csv").read_text() == (tmp_path / "whole" / "terms.csv").read_text()


def test_a_signal_while_a_figure_is_drawn(tmp_path: Path, run: Path) -> None:
    """It is made in one go and seconds: nothing is kept, no half picture is written."""
    picture = tmp_path / "figure.png"
    arguments = ("progressive", "--run", str(run), "--rows", "3", "--out", str(picture))
    said = launch(2, *arguments, script="evaluate", fault=Fault(action="stop", point="denoise", call=25, rank=0))
    assert f"stopped: 2 of 3 rows were drawn; {picture} is made in one go, give it again" in said
    assert not picture.exists()
    launch(2, *arguments, script="evaluate")
    assert picture.exists()


@contextmanager
def job(command: list[str], run: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A job in a group of its own that has trained a few steps, and everything below its launcher."""
    started = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(DDPM_PROCS_PER_NODE="2", DDPM_VENV=sys.prefix),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    below: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not (run / "logs" / "metrics.jsonl").exists() or not logged(run):
            assert time.monotonic() < deadline
            assert started.poll() is None, started.communicate()[0]
            time.sleep(0.1)
        below = psutil.Process(started.pid).children(recursive=True)
        yield started, below
    finally:
        for process in [*below, started]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
        started.wait()


@pytest.mark.parametrize(
    ("number", "start_method"),
    [
        (signal.SIGTERM, "fork"),
        pytest.param(signal.SIGTERM, "spawn", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "fork", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "spawn", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_every_process_of_a_job(
    tmp_path: Path, dataset: Path, number: signal.Signals, start_method: str
) -> None:
    """Launcher, two trainers, their loaders: all get it, as from a scheduler; saved, and nothing is left alive."""
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    settings = [*ENDLESS, *overrides(data__start_method=start_method, data__workers=2)]
    with job(["bash", "launch/local.sh", "--config", str(config), *settings], run) as (launcher, below):
        assert len(below) >= 2 + 2 * 2
        os.killpg(launcher.pid, number)  # the trainers are in groups of their own
        for process in 5 * below if number == signal.SIGTERM else []:  # more than once, as impatient schedulers do
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        output, _ = launcher.communicate(timeout=60)
        _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive
    assert launcher.returncode == 0, output
    (stopped,) = [event for event in events(run) if event["event"] == "stopped"]
    attempt = next(event for event in events(run) if event["event"] == "started")["attempt"]
    assert (run / "STOPPED").read_text() == f"step {stopped['step']}\nattempt {attempt}\n"
    assert read_verified(checkpoint(run, stopped["step"]))[1]["step"] == stopped["step"]


@pytest.mark.slow
def test_usr1_kills_a_bare_accelerate_but_its_workers_save(tmp_path: Path, dataset: Path) -> None:
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    command = [*accelerate, "--num_processes", "2", "--main_process_port", "0", "trainer/train.py"]
    with job([*command, "--config", str(config), *ENDLESS], run) as (launcher, below):
        os.killpg(launcher.pid, signal.SIGUSR1)
        launcher.communicate(timeout=60)
        _, alive = psutil.wait_procs(below, timeout=30)
    assert launcher.returncode == -signal.SIGUSR1
    assert not alive
    (stopped,) = [event for event in events(run) if event["event"] == "stopped"]
    assert read_verified(checkpoint(run, stopped["step"]))[1]["step"] == stopped["step"]
