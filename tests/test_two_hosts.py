"""Two machines, with Debian's /etc/hosts: they train as one does, and when one is lost the other goes on."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import assert_same_state, checkpoint, events, launch, logged, overrides, read_verified, write_config
from tests.hosts import two_hosts

STRATEGIES = {"ddp": 1, "zero2": 1, "hsdp": 2}  # processes on each host; hsdp shards within one
PORT = "29400"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_hosts_train_as_one_with_two_processes(tmp_path: Path, dataset: Path, strategy: str) -> None:
    """Through the README's launcher, without a word about network interfaces."""
    processes, spread = 2 * STRATEGIES[strategy], overrides(train__strategy=strategy)
    as_if = overrides(train__hsdp_shard_size=2) if strategy == "hsdp" else []
    launch(processes, "--config", str(write_config(tmp_path, dataset, "one_host")), *spread, *as_if)
    config = write_config(tmp_path, dataset, "two_hosts")
    log = tmp_path / "log"
    with two_hosts(tmp_path) as hosts:
        launchers = [
            host.start(
                log,
                *[sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"],
                *["--num_machines", "2", "--num_processes", str(processes), "--machine_rank", str(rank)],
                *["--main_process_ip", hosts[0].address, "--main_process_port", PORT],
                *["trainer/train.py", "--config", str(config), *spread],
            )
            for rank, host in enumerate(hosts)
        ]
        codes = [launcher.wait(timeout=240) for launcher in launchers]
    assert codes == [0, 0], log.read_text()
    assert_same_state(tmp_path / "one_host", tmp_path / "two_hosts", 6)
    assert logged(tmp_path / "one_host") == logged(tmp_path / "two_hosts")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lost", ["rank 0", "rank 1"])
def test_when_a_host_is_lost_the_other_goes_on(tmp_path: Path, dataset: Path, strategy: str, lost: str) -> None:
    """2 -> 1: the rendezvous is on the host that stays; the launcher gives rank 0 to alpha."""
    config, run, log = write_config(tmp_path, dataset), tmp_path / "run", tmp_path / "log"
    each, spread = STRATEGIES[strategy], overrides(train__strategy=strategy)
    times = overrides(train__duration="100k steps", checkpoint__every="20 steps", train__hang_timeout="5 seconds")
    with two_hosts(tmp_path) as (alpha, beta):
        doomed, other = (alpha, beta) if lost == "rank 0" else (beta, alpha)
        # A node is given up after three seconds, others are waited for five; by default it is fifteen and 30. By its
        # name, which is 127.0.1.1, a host does not know that the rendezvous is to be on it.
        quick = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=5,is_host="
        for host in (other, doomed):
            host.start(
                log,
                *[sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", str(each)],
                *["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "job"],
                *["--rdzv-endpoint", f"{other.address}:{PORT}", "--rdzv-conf", f"{quick}{int(host is other)}"],
                *["trainer/train.py", "--config", str(config), *times, *spread],
            )

        def started() -> list[tuple[int, int]]:
            path = run / "events.jsonl"
            found = events(run) if path.exists() else []
            return [(event["world_size"], event["step"]) for event in found if event["event"] == "started"]

        wait_until(lambda: checkpoint(run, 40).exists() and (2 * each, 0) in started(), log)
        doomed.crash()
        began = time.monotonic()
        wait_until(lambda: started()[-1][0] == each, log)
        seconds = time.monotonic() - began
        _, step = started()[-1]
        wait_until(lambda: checkpoint(run, step + 40).exists(), log)
        print(f"training again {seconds:.1f} s after the crash, from step {step}")
    seen = log.read_text()
    if lost == "rank 0":
        assert "and the store is silent: rank 0 or its host is lost" in seen
    else:
        assert "gone or frozen (killed, or the host is lost)" + (", last seen in" if each == 1 else ";") in seen
    assert step >= 40
    assert read_verified(checkpoint(run, step + 40))[1]["world_size"] == each


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
