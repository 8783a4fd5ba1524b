"""Real processes under torchrun see the same stream, however many there are and however their loaders start."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment, free_port
from tests.stream_ranks import ORDERS


def torchrun(processes: int, config: Path, *ways: str) -> list[str]:
    """The lines that say which streams were right: order, way, hash of the ids."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", "tests/stream_ranks.py", str(config), *ways]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), timeout=500, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("same ")]


@pytest.mark.parametrize(
    ("processes", "ways"), [(1, ["fork:2", "spawn:2"]), (2, ["fork:0", "spawn:1"]), (4, ["fork:2"])]
)
def test_the_stream_is_the_same_under_torchrun(config_path: Path, processes: int, ways: list[str]) -> None:
    """21 images in uneven shards, so epochs end inside batches, and lanes inside shards."""
    lines = torchrun(processes, config_path, *ways)
    assert [line.split()[1:3] for line in lines] == [[order, way] for order in ORDERS for way in ways]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_stream_is_the_same_under_torchrun_in_every_way(config_path: Path, processes: int) -> None:
    ways = [f"{method}:{workers}" for method in ("fork", "spawn") for workers in range(4)]
    assert len(torchrun(processes, config_path, *ways)) == len(ORDERS) * len(ways)
