"""What a killed run leaves in /dev/shm is removed when it starts again, and nothing of anybody else."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.engine.processes.semaphores import name_semaphores

SHARED = Path("/dev/shm")


@pytest.fixture(autouse=True)
def prefix_as_before() -> Iterator[None]:
    config = multiprocessing.current_process()._config
    before = config["semprefix"]
    yield
    config["semprefix"] = before


def semaphores() -> set[str]:
    return {path.name for path in SHARED.glob("sem.*")}


def test_a_start_removes_what_the_same_rank_of_the_same_run_has_left(tmp_path: Path) -> None:
    spawn, before = multiprocessing.get_context("spawn"), semaphores()
    name_semaphores(tmp_path / "run", 0)
    lock = spawn.Lock()
    (left,) = semaphores() - before
    copies = []
    for name in (left, left.replace("-0-", "-1-"), "sem.mp-somebodys"):  # of a killed start, another rank, another user
        copies.append(SHARED / f"{name}x")
        copies[-1].touch()
    try:
        name_semaphores(tmp_path / "another", 0)
        assert all(path.exists() for path in copies)
        del lock
        name_semaphores(tmp_path / "run", 0)
        assert [path.exists() for path in copies] == [False, True, True]
    finally:
        for path in copies:
            path.unlink(missing_ok=True)
