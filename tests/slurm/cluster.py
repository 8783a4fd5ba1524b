"""What the tests on a real SLURM share: the cluster's nodes, and jobs that are waited for."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.harness import REPOSITORY, environment

LAB = Path(__file__).with_name("lab.sh")
PATIENCE = 150.0  # seconds; what is waited for takes a tenth of it on an idle machine
_NO_ENVIRONMENT_OF = ("SLURM_", "SBATCH_", "SLURMD_", "SRUN_")


@dataclass(frozen=True)
class Cluster:
    """A lab that is running, and where its files lie."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a user of the cluster has in the shell."""
        clean = {k: v for k, v in environment().items() if not k.startswith(_NO_ENVIRONMENT_OF)}
        return {**clean, "SLURM_CONF": str(self.folder / "slurm.conf"), "VENV": os.environ.get("VENV", _venv())}

    def lab(self, command: str, *arguments: str, check: bool = True) -> str:
        """Run lab.sh COMMAND on this lab."""
        done = subprocess.run(
            [str(LAB), command, str(self.folder), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def on_node(self, node: str, *command: str, **extra: str) -> "subprocess.Popen[str]":
        """Start a command on a node as from a shell there, not through SLURM."""
        return subprocess.Popen(
            [str(LAB), "enter", str(self.folder), node, *command],
            cwd=REPOSITORY,
            env={**self.environment, **extra},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, expect: int | None = 0, **extra: str) -> str:
        """Run a command on the login node, in the repository; returns what it printed, both streams."""
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**self.environment, **extra},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        assert expect is None or done.returncode == expect, f"{shlex.join(command)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def sbatch(self, *arguments: str, log: Path, **extra: str) -> "Job":
        """Submit; `log` gets what the job prints."""
        printed = self.run("sbatch", "--parsable", f"--output={log}", *arguments, **extra)
        return Job(self, printed.strip().splitlines()[-1].split(";")[0], log)

    def idle(self) -> bool:
        """Whether all nodes are up and free."""
        return set(self.run("sinfo", "--noheader", "--Node", "--partition=train", "--format=%T").split()) == {"idle"}


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: Cluster
    number: str
    log: Path

    def field(self, name: str) -> str:
        """One of scontrol's fields: JobState, Restarts, NodeList, ExitCode."""
        shown = self.cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        found = re.search(rf"(?<!\S){name}=(\S*)", shown)
        assert found is not None, shown
        return found[1]

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def is_over(self) -> bool:
        return self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Poll until the condition holds; fails with the job's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}; {self.state}\n{self.output}"
            time.sleep(0.25)

    def wait(self) -> str:
        """Wait until it is over for good; returns its state."""
        self.wait_until("job over", self.is_over)
        return self.state

    def signal_batch(self, name: str) -> None:
        """What SLURM does before the limit: a signal to the batch script alone."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.number)

    def cancel(self) -> None:
        self.cluster.run("scancel", self.number)


def _venv() -> str:
    import sys

    return sys.prefix
