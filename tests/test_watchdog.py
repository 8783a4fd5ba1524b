"""A rank that fails, hangs or is gone ends the run for all, and is named: no launcher needs to help.

The harness ends no rank here before 30 seconds have passed since the first one failed.
"""

import ctypes
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.faults import Fault
from tests.harness import events, launch, overrides
from trainer.engine.processes import activity
from trainer.engine.processes.activity import enter, watch_over
from trainer.engine.processes.peer_status import Peers, Progress, Status, ranks, verdict
from trainer.engine.processes.watchdog import EXIT_CODE, Watchdog
from trainer.signals import StopRequest

ENDLESS = overrides(train__duration="100k steps", checkpoint__every="0 steps")
QUICK = [*ENDLESS, *overrides(train__hang_timeout="6 seconds")]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_ends_the_others_with_its_reason(config_path: Path, tmp_path: Path, failing: int) -> None:
    """Rank 0 holds the store: it does not leave before the others have read why."""
    fault = Fault(action="raise", point="update", call=3, rank=failing)
    codes = [1 if rank == failing else EXIT_CODE for rank in range(3)]
    three = overrides(train__global_batch=6)
    output = launch(3, "--config", str(config_path), *ENDLESS, *three, fault=fault, expect=codes)
    for rank in {0, 1, 2} - {failing}:
        line = f"rank {failing} failed: RuntimeError: injected fault; this rank ({rank}) ends with it"
        assert output.count(line) == 1
    assert output.count("Traceback") == 1  # the error's own, and none of a broken connection
    if failing != 0:
        (event,) = [event for event in events(tmp_path / "run") if event["event"] == "rank_failed"]
        assert (event["rank"], event["reason"]) == (1, "RuntimeError: injected fault")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_that_was_killed_is_named_by_those_that_lose_it(config_path: Path, killed: int) -> None:
    """With rank 0 the others lose the store, too."""
    fault = Fault(action="kill", point="device_batch", call=3, rank=killed)
    codes = [-9 if rank == killed else EXIT_CODE for rank in range(3)]
    three = overrides(train__global_batch=6)
    output = launch(3, "--config", str(config_path), *ENDLESS, *three, fault=fault, expect=codes)
    for rank in {0, 1, 2} - {killed}:
        (line,) = [line for line in output.splitlines() if f"this rank ({rank}) ends with it" in line]
        assert line.startswith(f"rank {killed} failed: it is gone (killed, or its host is lost)")
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("point", "where"),
    [
        pytest.param("read", "data", marks=pytest.mark.slow),
        ("device_batch", "forward"),
        pytest.param("write_part", "save", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_stacks_are_written(
    config_path: Path, tmp_path: Path, point: str, where: str
) -> None:
    """Rank 1 hangs in its loader, in a step, and in a save behind its back; rank 0 waits for it in a collective."""
    saves = overrides(checkpoint__every="4 steps")
    if point == "write_part":  # of which the next save, which waits for it, need not tell
        saves += overrides(train__hang_timeout="3 seconds")
    call = 1 if point == "write_part" else 5
    fault = Fault(action="hang", point=point, call=call, rank=1)
    output = launch(2, "--config", str(config_path), *QUICK, *saves, fault=fault, expect=EXIT_CODE)
    (line,) = [line for line in output.splitlines() if line.endswith(f"stacks are above and in {tmp_path}/run/hangs")]
    if where == "save":
        assert line.startswith("rank 1 hangs in 'save' of step 4, in the background; the run ends")
    else:
        assert line.startswith(f"rank 1 is in '{where}' of step 5; rank 0 waits for it in ")
    stacks = [(tmp_path / "run" / "hangs" / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    for rank, text in enumerate(stacks):
        assert f"rank {rank} on " in text
        assert text.strip() in output
        assert text.count("thread MainThread\n") == 1
        assert ", in _train\n" in text
    assert f"'{where}' of step " in stacks[1]
    assert "tests/faults.py" in stacks[1] or where == "data"  # that one hangs in another process
    assert "tests/faults.py" not in stacks[0]
    journals = [tmp_path / "run" / name for name in ("events.jsonl", "events-rank-00001.jsonl")]
    assert sum(journal.read_text().count('"event": "hang"') for journal in journals if journal.exists()) == 1


@pytest.mark.slow
def test_a_frozen_rank_is_named_by_the_others(config_path: Path) -> None:
    """A process that is stopped writes no stacks, neither does a host that is lost."""
    fault = Fault(action="freeze", point="device_batch", call=3, rank=1)
    output = launch(2, "--config", str(config_path), *QUICK, fault=fault, expect=[EXIT_CODE, -9])
    assert "rank 1 is gone or frozen (killed, or the host is lost), last seen in " in output
    assert "; rank 0 waits for it in 'backward' of step 3; the run ends" in output


def hold_the_lock(hang_timeout: float) -> None:
    """A process that keeps the interpreter's lock in its first step, before the watchdog has looked even once."""
    activity._GRACE_SECONDS = 0.0
    with Watchdog(rank=0, world_size=1, hang_timeout=hang_timeout, timeout=600, stop=StopRequest()):
        enter("data", step=1)
        ctypes.PyDLL(None).sleep(3600)


def test_a_process_ends_though_its_interpreter_is_locked_before_the_watchdog_looks() -> None:
    process = multiprocessing.get_context("fork").Process(target=hold_the_lock, args=(0.3,))
    process.start()
    process.join(10)
    process.kill()
    assert process.exitcode == 1


@pytest.mark.slow
def test_a_process_ends_though_its_interpreter_is_locked(config_path: Path) -> None:
    fault = Fault(action="hold", point="device_batch", call=3, rank=0)
    soon = overrides(train__hang_timeout="2 seconds")
    output = launch(1, "--config", str(config_path), *ENDLESS, *soon, fault=fault, expect=1)
    assert "Timeout (0:00:" in output
    assert ", line " in output.partition("Timeout")[2]


@pytest.mark.slow
def test_one_process_alone_ends_when_it_hangs(config_path: Path, tmp_path: Path) -> None:
    fault = Fault(action="hang", point="device_batch", call=3, rank=0)
    output = launch(1, "--config", str(config_path), *QUICK, fault=fault, expect=EXIT_CODE)
    assert "this process hangs in 'forward' of step 3; the run ends" in output
    assert "tests/faults.py" in (tmp_path / "run" / "hangs" / "rank-00000.txt").read_text()


def await_end_of(work: Callable[[], None], hang_timeout: float, timeout: float) -> None:
    with Watchdog(rank=0, world_size=1, hang_timeout=hang_timeout, timeout=timeout, stop=StopRequest()):
        work()


def ends_as_hung(work: Callable[[], None], *, hang_timeout: float, timeout: float, within: float) -> bool:
    process = multiprocessing.get_context("fork").Process(target=await_end_of, args=(work, hang_timeout, timeout))
    process.start()
    process.join(within)
    code, _ = process.exitcode, process.kill()
    assert code in (0, None, EXIT_CODE)
    return code == EXIT_CODE


def test_a_file_that_never_answers_ends_a_run_before_its_first_step(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "shard.tar")
    assert ends_as_hung((tmp_path / "shard.tar").read_bytes, hang_timeout=0.1, timeout=1.0, within=10)


def test_a_start_that_reads_or_computes_is_no_hang(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(bytes(2**20))

    def read_slowly() -> None:
        for _ in range(12):
            (tmp_path / "shard.tar").read_bytes()
            time.sleep(0.2)

    def compute() -> None:
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            pass

    for work in (read_slowly, compute):
        assert not ends_as_hung(work, hang_timeout=0.1, timeout=1.0, within=5)


def test_a_thread_that_hangs_in_the_background_ends_a_run_that_trains_on() -> None:
    """A save that never comes to an end is not found out by the next one, hours later."""

    def train() -> None:
        thread = threading.Thread(target=time.sleep, args=(60,), daemon=True)
        enter("data", step=1)
        enter("data", step=2)
        thread.start()
        watch_over(thread, "save")
        while True:
            enter("data")
            time.sleep(0.01)

    assert ends_as_hung(train, hang_timeout=0.3, timeout=600, within=10)


@pytest.mark.slow
def test_timeout_bounds_the_waiting_in_a_collective(config_path: Path) -> None:
    """Without a hang_timeout too, and the hang is reported just the same."""
    times = overrides(train__timeout="5 seconds", train__hang_timeout="0 seconds")
    fault = Fault(action="hang", point="device_batch", call=3, rank=1)
    output = launch(2, "--config", str(config_path), *ENDLESS, *times, fault=fault, expect=EXIT_CODE)
    assert "rank 1 is in 'forward' of step 3; rank 0 waits for it in 'backward' of step 3; the run ends" in output


def test_timeout_bounds_the_waiting_for_a_rank_that_does_not_come(
    config_path: Path,
) -> None:
    missing = Fault(action="kill", point="join", call=1, rank=1)
    times = overrides(train__timeout="4 seconds", train__global_batch=6)
    output = launch(3, "--config", str(config_path), *times, fault=missing, expect=[2, -9, 2])
    assert "error: of 3 processes these have not come: rank 1" in output


def test_what_all_ranks_raise_together_is_told_once(config_path: Path) -> None:
    full = Fault(action="full", point="write_part", call=1, rank=1)
    output = launch(2, "--config", str(config_path), fault=full, expect=2)
    assert output.count("No space left on device") == 1
    assert "ends with it" not in output


def status(phase: str, entered: int, pulse: int = 1) -> Status:
    return Status(Progress(phase, 7, entered), pulse, "host")


def test_a_verdict_names_the_hindmost() -> None:
    waiting = {rank: status("backward", 30) for rank in range(6)}
    hangs = waiting | {2: status("data", 28)}
    line = "rank 2 is in 'data' of step 7; ranks 0-1, 3-5 wait for it in 'backward' of step 7"
    assert verdict(hangs, [], 6) == line
    assert verdict(waiting, [], 6) == "all 6 ranks hang in 'backward' of step 7"
    gone = "rank 2 is gone or frozen (killed, or the host is lost), last seen in 'data' of step 7 on host; "
    assert verdict(hangs, [2], 6) == gone + "ranks 0-1, 3-5 wait for it in 'backward' of step 7"
    assert ranks([5]) == "rank 5"
    behind = waiting | {2: replace(status("backward", 30), stuck="'save' of step 4, in the background")}
    assert verdict(behind, [], 6) == "rank 2 hangs in 'save' of step 4, in the background"


def test_a_rank_that_waits_for_one_at_work_does_not_hang() -> None:
    """A slow disk on one rank: the others wait in an exchange, in which they give no sign of life."""
    peers = Peers(dist.HashStore(), rank=0, world_size=2, host="host")
    peers.tell(Progress("save", 7, 30), idle=100)
    working, idle = (Status(Progress("save", 7, 30), 2, "host", idle=idle) for idle in (1.0, 100.0))
    before = {0: status("save", 30), 1: status("save", 30)}
    assert peers.at_work(before, {1: working}, 60)
    assert not peers.at_work(before, {1: idle}, 60)
    assert not peers.at_work({1: working}, {1: working}, 60)  # frozen: its watchdog is silent, too
    assert not peers.at_work(before, {1: replace(working, progress=Progress("data", 8, 31))}, 60)


def test_progress_counts_alike_whatever_a_rank_repeats() -> None:
    """A rank that draws more samples than another gives more signs of life, but enters no more phases."""
    one = other = Progress(since=time.monotonic())
    for phase, step in (("data", 1), ("forward", None), ("sample", None), ("sample", None), ("data", 2)):
        one = one.enter(phase, step)
        other = other if phase == "sample" == other.phase else other.enter(phase, step)
    assert one.entered == other.entered == 4
    assert (one.step, one.steps, str(one)) == (2, 2, "'data' of step 2")
