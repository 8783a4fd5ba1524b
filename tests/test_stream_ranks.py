"""Real processes under torchrun see the same stream, however many there are and however their loaders start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment, free_port

ORDERS = ("global", "windowed", "lanes")


def torchrun(processes: int, config: Path, *ways: str) -> list[str]:
    """Which ways of streaming were right."""
    output = streamed(processes, config, *ways)
    return [line.removeprefix("same ") for line in output if line.startswith("same ")]


def streamed(processes: int, config: Path, *ways: str) -> list[str]:
    """What the first rank printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", "tests/stream_ranks.py", str(config), *ways]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), timeout=500, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


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


def test_the_stream_is_the_same_with_three_processes(config_path: Path) -> None:
    """24 images a batch, more than the 21 of an epoch."""
    config_path.write_text(config_path.read_text().replace("global_batch = 8", "global_batch = 24"))
    ways = ["global:fork:0", "windowed:fork:1", "lanes:fork:0"]
    assert torchrun(3, config_path, *ways) == ways


def test_epochs_are_exact_through_restarts_with_other_numbers_of_processes(config_path: Path) -> None:
    """Jobs of two, one and two processes, each from the step where the last one ended, inside an epoch."""
    ids: dict[str, list[int]] = {order: [] for order in ORDERS}
    for processes, first, last in ((2, 0, 2), (1, 2, 5), (2, 5, 8)):
        output = streamed(processes, config_path, *(f"{order}:fork:1:{first}:{last}" for order in ORDERS))
        printed = [json.loads(line.removeprefix("ids ")) for line in output if line.startswith("ids ")]
        for order, part in zip(ORDERS, printed, strict=True):
            ids[order] += part
    for seen in ids.values():
        assert len(seen) == 64
        for epoch in range(3):
            assert sorted(seen[21 * epoch : 21 * epoch + 21]) == list(range(21))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_stream_is_the_same_under_torchrun_in_every_way(config_path: Path, processes: int) -> None:
    ways = [f"{order}:{method}:{n}" for order in ORDERS for method in ("fork", "spawn") for n in range(4)]
    assert torchrun(processes, config_path, *ways) == ways
