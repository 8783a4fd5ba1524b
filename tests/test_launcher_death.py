"""A worker ends with its launcher, from the first moment on: before anything is imported that takes time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.harness import REPOSITORY, environment
from trainer.errors import TrainerError
from trainer.launcher import parent as launcher

WORKER = 'export DDPM_LAUNCHER_PID=$$; "$PYTHON" "$SCRIPT" --config "$CONFIG" --run "$CONFIG" >/dev/null & echo $!'


@pytest.mark.parametrize("lives", ["", "sleep 0.5"])  # seconds: dead before Python has begun; while it imports
@pytest.mark.parametrize("script", ["train", "sample"])
def test_a_launchers_death_in_the_first_second_ends_its_worker(tmp_path: Path, lives: str, script: str) -> None:
    os.mkfifo(tmp_path / "config.toml")  # never answers: what would go on does not come to an end
    names = {"PYTHON": sys.executable, "SCRIPT": f"trainer/{script}.py", "CONFIG": str(tmp_path / "config.toml")}
    done = subprocess.run(
        ["bash", "-c", f"{WORKER}; {lives}"],
        env=environment(**names, ACCELERATE_MIXED_PRECISION="no"),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    worker = int(done.stdout)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        assert not psutil.pid_exists(worker)
    finally:
        if psutil.pid_exists(worker):
            psutil.Process(worker).kill()


@pytest.mark.parametrize(
    ("number", "parent", "python", "gone"),
    [
        ("7", 7, False, False),
        ("7", 8, True, True),
        (None, 1, False, True),
        (None, 1, True, False),
        (None, 9, True, False),
    ],
)
def test_who_has_been_adopted(
    monkeypatch: pytest.MonkeyPatch, number: str | None, parent: int, python: bool, gone: bool
) -> None:
    """The launcher's number decides; else init has adopted it, unless it is a Python: the launcher of a container."""
    monkeypatch.delenv("DDPM_LAUNCHER_PID", raising=False)
    if number is not None:
        monkeypatch.setenv("DDPM_LAUNCHER_PID", number)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(launcher, "_parent", parent)
    monkeypatch.setattr(launcher, "_is_python", lambda _: python)
    monkeypatch.setattr(launcher, "on_parents_death", lambda _: None)
    monkeypatch.setattr(os, "getppid", lambda: parent)
    if gone:
        with pytest.raises(TrainerError, match="the launcher is gone"):
            launcher.end_with_launcher()
    else:
        assert launcher.end_with_launcher() == 0
