"""A run that was stopped, killed or moved to another number of processes is the run that was not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults import Fault
from tests.harness import (
    REPOSITORY,
    assert_same_state,
    checkpoint,
    environment,
    events,
    free_port,
    largest_difference,
    launch,
    logged,
    overrides,
    read_verified,
    tensors_of,
    write_config,
)

# docs/telemetry.md says so of them.
EXACT = [
    *("train/loss", "train/loss_smoothed", "train/bound_bits_per_dim", "train/noise_scale", "train/ema_distance"),
    *(f"train/loss_q{number}" for number in (1, 2, 3, 4)),
    *("train/grad_norm", "train/grad_norm_max", "train/learning_rate", "train/epoch", "train/nonfinite_steps"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(runs: Path, dataset: Path) -> Path:
    """Six steps in one go on two processes, each accumulating two micro-batches of two."""
    config = write_config(runs, dataset, "uninterrupted")
    launch(2, "--config", str(config), *overrides(train__micro_batch=2))
    return runs / "uninterrupted"


def test_a_finished_run_started_again_says_so(runs: Path, dataset: Path) -> None:
    arguments = ["--config", str(write_config(runs, dataset, "finished")), *overrides(train__duration="1 steps")]
    assert "is finished" not in launch(1, *arguments)
    told = launch(1, *arguments)
    last = checkpoint(runs / "finished", 1)
    assert f"finished: is finished: trained to step 1 of 1, last checkpoint {last}; to go on, raise" in told
    assert 'for example --set train.duration="2 steps"' in told
    assert "is finished" not in launch(1, *arguments, *overrides(train__duration="2 steps"))


def test_stopping_and_resuming_changes_no_bit(runs: Path, dataset: Path, uninterrupted: Path) -> None:
    """N steps = k + resume + (N - k): weights, moments, EMA, learning rate and logged losses."""
    config = write_config(runs, dataset, "in_parts")
    for duration in ("1 steps", "4 steps", "6 steps"):
        launch(2, "--config", str(config), *overrides(train__micro_batch=2, train__duration=duration))
    run = runs / "in_parts"
    assert_same_state(uninterrupted, run, 6)
    for name in EXACT:
        assert logged(run, name) == logged(uninterrupted, name), name
    assert [event["step"] for event in events(run) if event["event"] == "started"] == [0, 1, 4]


@pytest.mark.slow
def test_log_lines_between_checkpoints_survive(runs: Path, dataset: Path, uninterrupted: Path) -> None:
    """Means over four steps, with stops after three and after six: a signal in one step ends the run with the next."""
    rare = overrides(train__micro_batch=2, log__every="4 steps", checkpoint__every="0 steps", train__duration="8 steps")
    whole, parts = (write_config(runs, dataset, name) for name in ("rare_whole", "rare_parts"))
    launch(2, "--config", str(whole), *rare)
    for stop in (3, 6):
        launch(2, "--config", str(parts), *rare, fault=Fault(action="stop", point="device_batch", call=3, rank=0))
        assert checkpoint(runs / "rare_parts", stop).exists()
    launch(2, "--config", str(parts), *rare)
    assert sorted(logged(runs / "rare_whole")) == [4, 8]
    for name in EXACT:
        assert logged(runs / "rare_parts", name) == logged(runs / "rare_whole", name), name
    losses = logged(uninterrupted)
    assert logged(runs / "rare_whole")[4] == pytest.approx(sum(losses[step] for step in (1, 2, 3, 4)) / 4, rel=1e-12)


def test_killed_inside_gradient_accumulation(runs: Path, dataset: Path, uninterrupted: Path) -> None:
    """Killed at the second micro-batch of step 4; goes on from the checkpoint of step 2."""
    config = write_config(runs, dataset, "killed_inside")
    arguments = ("--config", str(config), *overrides(train__micro_batch=2))
    fault = Fault(action="kill", point="device_batch", call=8, rank=1)
    launch(2, *arguments, fault=fault, expect=None)
    run = runs / "killed_inside"
    assert not (run / "DONE").exists()
    launch(2, *arguments)
    assert_same_state(uninterrupted, run, 6)
    assert logged(run) == logged(uninterrupted)


def test_another_number_of_processes_sees_the_same_stream(runs: Path, dataset: Path, uninterrupted: Path) -> None:
    """2 -> 1 (which accumulates four micro-batches) -> 4 processes, against 1 that does not accumulate.

    The stream's equality is tested bit by bit elsewhere, here that losses and state follow.

    Dropout draws a mask for a micro-batch as a whole, so it is off.
    """
    still = overrides(model__dropout=0.0)
    whole = write_config(runs, dataset, "one_process")
    launch(1, "--config", str(whole), *still)
    config = write_config(runs, dataset, "moved")
    for processes, duration in ((2, "2 steps"), (1, "4 steps"), (4, "6 steps")):
        parts = overrides(train__duration=duration, train__micro_batch=2)
        launch(processes, "--config", str(config), *still, *parts)
    one, moved = runs / "one_process", runs / "moved"
    assert largest_difference(tensors_of(one, 6), tensors_of(moved, 6)) < 1e-5  # Adam divides small gradients by small
    losses, moved_losses = logged(one), logged(moved)
    assert losses.keys() == moved_losses.keys()
    assert max(abs(losses[step] - moved_losses[step]) for step in losses) < 1e-6
    # and dropout is not what makes them equal: with it the losses differ
    assert abs(logged(uninterrupted)[6] - losses[6]) > 3e-6


def test_a_finished_run_stays_as_it_is(uninterrupted: Path) -> None:
    before = sorted(str(path) for path in uninterrupted.rglob("step-*"))
    launch(1, "--config", str(uninterrupted / "config.toml"))
    assert (uninterrupted / "DONE").exists()
    assert sorted(str(path) for path in uninterrupted.rglob("step-*")) == before
    assert sorted(logged(uninterrupted)) == [1, 2, 3, 4, 5, 6]


def accelerate(processes: int) -> list[str]:
    """The README's launcher."""
    several = ["--multi_gpu"] if processes > 1 else []
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *several]
    return [*launcher, "--num_processes", str(processes), "--main_process_port", str(free_port())]


def start_and_wait_for_step_4(processes: int, config: Path, run: Path) -> tuple[psutil.Process, list[psutil.Process]]:
    """Start a run without end; returns its launcher and everything below it when step 4 is saved."""
    endless = ["--config", str(config), *overrides(train__duration="100k steps")]
    job = psutil.Popen(
        [*accelerate(processes), "trainer/train.py", *endless],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not checkpoint(run, 4).exists():
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.05)
    return job, job.children(recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launch_survives_kill_9_of_all_of_it(tmp_path: Path, dataset: Path, processes: int) -> None:
    """The README's command, every process of it killed in mid-run, then given again."""
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    launcher, workers = start_and_wait_for_step_4(processes, config, run)
    for process in [launcher, *workers]:
        process.kill()
    psutil.wait_procs([launcher, *workers], timeout=30)
    newest = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    shorter = overrides(train__duration=f"{newest + 3} steps")
    done = subprocess.run(
        [*accelerate(processes), "trainer/train.py", "--config", str(config), *shorter],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert f"step {newest} of {newest + 3}" in done.stdout
    started = [event for event in events(run) if event["event"] == "started"]
    assert [(event["step"], event["world_size"]) for event in started] == [(0, processes), (newest, processes)]
    assert checkpoint(run, newest + 3).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGTERM)], ids=str
)
def test_when_the_launcher_ends_its_workers_save_and_end(
    tmp_path: Path, dataset: Path, processes: int, number: signal.Signals
) -> None:
    """Killed, it leaves orphans; terminated, it signals the workers' whole process groups, loaders included."""
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    launcher, workers = start_and_wait_for_step_4(processes, config, run)
    launcher.send_signal(number)
    _, alive = psutil.wait_procs([launcher, *workers], timeout=30)
    assert not alive
    (stopped,) = [event for event in events(run) if event["event"] == "stopped"]
    assert read_verified(checkpoint(run, stopped["step"]))[1]["step"] == stopped["step"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_saves_and_ends(tmp_path: Path, dataset: Path, number: signal.Signals) -> None:
    config = write_config(tmp_path, dataset)
    never = overrides(train__duration="100k steps", checkpoint__every="100k steps")
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "trainer/train.py", "--config", str(config), *never],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        deadline = time.monotonic() + 120
        while not (run / "logs" / "metrics.jsonl").exists() or not logged(run):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(number)
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    (stopped,) = [event for event in events(run) if event["event"] == "stopped"]
    assert read_verified(checkpoint(run, stopped["step"]))[1]["step"] == stopped["step"]
    assert not (run / "DONE").exists()
    assert max(logged(run)) == stopped["step"]
