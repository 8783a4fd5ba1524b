"""What the tests on a real SLURM share: the cluster's nodes, and jobs that are waited for."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from tests.harness import REPOSITORY, environment, events, write_config

LAB = Path(__file__).with_name("lab.sh")
ENDLESS = 1_000_000  # steps
PATIENCE = 180.0  # seconds; what is waited for takes a tenth of it on an idle machine
_NO_ENVIRONMENT_OF = ("SLURM_", "SBATCH_", "SLURMD_", "SRUN_")


@dataclass(frozen=True)
class Cluster:
    """A lab that is running, and where its files lie."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a user of the cluster has in the shell."""
        clean = {k: v for k, v in environment().items() if not k.startswith(_NO_ENVIRONMENT_OF)}
        return {**clean, "SLURM_CONF": str(self.folder / "slurm.conf"), "DDPM_VENV": sys.prefix}

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

    def train(
        self, run: "Run", *options: str, nodes: int = 2, script: Path = Path("launch/train.sbatch"), **extra: str
    ) -> "Job":
        """Submit launch/train.sbatch for a run."""
        log = run.folder.with_suffix(".log")
        job = (str(script), "--config", str(run.config))
        return self.sbatch(f"--nodes={nodes}", "--time=10", *options, *job, log=log, **extra)

    def cancel_all(self) -> None:
        """End whatever was submitted, and wait until the nodes are free; one that SLURM has lost is booted anew."""
        self.run("scancel", "--state=PENDING", "--user=root")
        self.run("scancel", "--user=root")
        deadline = time.monotonic() + PATIENCE
        while not self.idle():
            for node in self.run("sinfo", "--noheader", "--Node", "--partition=train", "--dead", "--format=%N").split():
                print(f"{node} is lost; the end of its log:\n{self.log(node)[-3000:]}")
                self.lab("crash", node)
                self.lab("boot", node)
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", expect=None)
            assert time.monotonic() < deadline, self.run("sinfo", "--Node", "--long") + self.run("squeue")
            time.sleep(1)

    def log(self, node: str) -> str:
        """What slurmd has logged on a node."""
        return (self.folder / "log" / f"slurmd.{node}.log").read_text(errors="replace")

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


@dataclass(frozen=True)
class Run:
    """A run that a job trains, and its configuration's file, which every start reads anew."""

    folder: Path
    config: Path

    @classmethod
    def make(cls, folder: Path, data: Path, name: str = "run") -> "Run":
        """Of practically endless duration, with a checkpoint every 50 steps; all are alike, and so their states."""
        run = cls(folder / name, write_config(folder, data, name))
        run._set("every", '"2 steps"', '"50 steps"')
        run._set("keep", "10", "1000")
        run._set("every", '"1 steps"', '"10 steps"')
        run.end_at(ENDLESS)
        return run

    def end_at(self, step: int) -> None:
        """From the next start on, the run is over with that step."""
        text = self.config.read_text()
        self.config.write_text(re.sub(r'duration = ".*"', f'duration = "{step} steps"', text))

    def _set(self, field: str, before: str, after: str) -> None:
        text = self.config.read_text()
        assert text.count(f"{field} = {before}\n") == 1
        self.config.write_text(text.replace(f"{field} = {before}\n", f"{field} = {after}\n"))

    @property
    def step(self) -> int:
        """The last that was logged."""
        path = self.folder / "logs" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Of that name."""
        path = self.folder / "events.jsonl"
        return [event for event in events(self.folder) if event["event"] == name] if path.exists() else []

    def tensorboard_steps(self) -> list[int]:
        """Of the losses, as TensorBoard shows them."""
        accumulator = EventAccumulator(str(self.folder / "logs"), size_guidance={SCALARS: 0})
        accumulator.Reload()
        return [event.step for event in accumulator.Scalars("train/loss")]
