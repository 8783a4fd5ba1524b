"""What a wheel installs works outside a clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment, make_dataset
from trainer.__main__ import COMMANDS

LOAD_ALL = """
import importlib.metadata, sys, trainer
assert trainer.__file__.startswith(sys.argv[1]), trainer.__file__
(distribution,) = importlib.metadata.distributions(name="ddpm-trainer", path=[sys.argv[1]])
for entry in sorted(distribution.entry_points):
    entry.load()
    print(entry.name)
"""


@pytest.mark.slow
def test_a_wheel_brings_every_command_and_the_papers_configurations(tmp_path: Path) -> None:
    source, wheels, site = (tmp_path / name for name in ("source", "wheels", "site"))
    # A copy of what git has: setuptools writes beside the sources.
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    archive = subprocess.run(
        ["tar", "-c", "--null", "-T", "-"], cwd=REPOSITORY, input=files, capture_output=True, check=True
    )
    source.mkdir()
    subprocess.run(["tar", "-x"], cwd=source, input=archive.stdout, check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    outside = environment(PYTHONPATH=str(site), PATH=f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def run(*command: str, expect: int = 0) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=outside, capture_output=True, text=True)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    assert run(sys.executable, "-c", LOAD_ALL, str(site)).split() == sorted(COMMANDS)
    assert "35,746,307 parameters" in run("ddpm-train", "--config", "cifar10", "--dry-run", expect=2)  # it has no data
    data = make_dataset(tmp_path)
    run("ddpm-init", str(data), "--for", "cpu", "--out", "mine.toml")
    short = ["--set", "train.duration=1 steps", "--set", "train.global_batch=2", "--set", "log.samples_every=0 steps"]
    run("ddpm-launch", "train", "--config", "mine.toml", *short)
    assert (elsewhere / "runs" / "shards" / "DONE").is_file()
    run("ddpm-report", "runs/shards")
