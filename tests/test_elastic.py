"""Workers that a launcher starts again, and jobs that meet in one folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import Fault
from tests.harness import (
    REPOSITORY,
    assert_same_state,
    environment,
    events,
    free_port,
    launch,
    logged,
    overrides,
    write_config,
)

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"],
    "accelerate": [
        *["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"],
        *["--max_restarts", "2", "--main_process_port"],
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path: Path, dataset: Path, launcher: str) -> None:
    """Killed in step 4, after the checkpoint of step 2; the launcher starts both workers again."""
    launch(2, "--config", str(write_config(tmp_path, dataset, "whole")))
    config = write_config(tmp_path, dataset, "restarted")
    port = [str(free_port())] if launcher == "accelerate" else []
    fault = Fault(action="kill", point="device_batch", call=4, rank=1)
    at_once = overrides(checkpoint__background="false")
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *port, "tests/faulty_train.py", "--config", str(config), *at_once],
        cwd=REPOSITORY,
        env=environment(**fault.environment()),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    whole, restarted = tmp_path / "whole", tmp_path / "restarted"
    assert_same_state(whole, restarted, 6)
    assert logged(restarted) == logged(whole)
    assert (restarted / "DONE").exists()
    started = [event for event in events(restarted) if event["event"] == "started"]
    assert [(event["step"], event["world_size"]) for event in started] == [(0, 2), (2, 2)]
    owner = re.fullmatch(r"process (\d+) on .*\n", (restarted / "lock").read_text())
    assert owner
    assert "Traceback" not in done.stderr  # of the worker that lost the other
