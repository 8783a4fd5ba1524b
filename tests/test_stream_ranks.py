"""Real processes under torchrun see the same stream, however many there are and however their loaders start."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment, free_port

ORDERS = ("global", "windowed", "lanes")


def torchrun(processes: int, config: Path, *ways: str) -> list[str]:
    """Which ways of streaming were right."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", "tests/stream_ranks.py", str(config), *ways]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), timeout=500, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.removeprefix("same ") for line in done.stdout.splitlines() if line.startswith("same ")]


@pytest.mark.parametrize(
    ("processes", "ways"),
    [
        (1, ["global:fork:2", "windowed:fork:0", "lanes:spawn:2"]),
        (2, ["global:fork:0", "windowed:spawn:1", "lanes:fork:2"]),
        (4, ["global:fork:0", "windowed:fork:2", "lanes:fork:0"]),
    ],
)
def test_the_stream_is_the_same_under_torchrun(config_path: Path, processes: int, ways: list[str]) -> None:
    """21 images in uneven shards, so epochs end inside batches, and lanes inside shards."""
    assert torchrun(processes, config_path, *ways) == ways


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_stream_is_the_same_under_torchrun_in_every_way(config_path: Path, processes: int) -> None:
    ways = [f"{order}:{method}:{n}" for order in ORDERS for method in ("fork", "spawn") for n in range(4)]
    assert torchrun(processes, config_path, *ways) == ways
