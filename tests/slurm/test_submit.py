"""launch/submit.py: what cannot run is refused before it waits in a queue, what can is submitted and followed."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, checkpoint
from tests.slurm.cluster import Cluster, Job, Run

SUBMIT = (sys.executable, "launch/submit.py")


@pytest.fixture
def run(tmp_path: Path, dataset: Path) -> Run:
    made = Run.make(tmp_path, dataset)
    made.end_at(20)
    return made


def submit(cluster: Cluster, run: Run, *arguments: str, expect: int = 0, **extra: str) -> str:
    return cluster.run(*SUBMIT, str(run.config), "--nodes", "2", *arguments, expect=expect, **extra)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "1", "--time", "10", "--partition", "nowhere"], "nowhere: no such partition; there are: train, "),
        (["--gpus", "1", "--time", "10", "--partition", "short"], "--time 10: partition short allows 00:05:00"),
        (["--gpus", "4", "--time", "10"], "sbatch would refuse this job: allocation failure: Requested node config"),
    ],
)
def test_what_slurm_cannot_run_is_refused_in_one_line(
    cluster: Cluster, run: Run, arguments: list[str], words: str
) -> None:
    said = submit(cluster, run, *arguments, expect=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not run.folder.exists()
    assert not cluster.run("squeue", "--noheader")


def test_a_dry_run_shows_the_command_and_changes_nothing(cluster: Cluster, run: Run) -> None:
    said = submit(
        cluster, run, "--gpus", "2", "--time", "1:00:00", "--elastic-restarts", "2", "--dry-run", "--", "--exclude=n3"
    )
    assert "8 = 2 images x 1 accumulated x 4 processes" in said
    assert "time left    unknown: the run has not been logged yet" in said
    assert "DDPM_ELASTIC_RESTARTS=2 sbatch " in said
    assert "--nodes=2 --time=1:00:00 --signal=B:USR1@120" in said
    assert "--gpus-per-node=2 --exclude=n3" in said
    assert not run.folder.exists()
    assert not cluster.run("squeue", "--noheader")


def test_a_chain_goes_on_job_after_job(cluster: Cluster, run: Run, tmp_path: Path) -> None:
    """The first is stopped as before its limit, the second finishes, and the third finds nothing to do.

    Each node gives a GPU, and reads the shards from copies on its own disk. The container is a stand-in for apptainer,
    which notes what it is asked and runs it as it is.
    """
    run.end_at(1_000_000)
    image, asked = tmp_path / "image.sif", tmp_path / "asked"
    image.touch()
    stand_in = tmp_path / "bin" / "apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\necho "$*" >>{asked}\nshift 6\n[ "$1" = {image} ] && shift && exec "$@"\n')
    stand_in.chmod(0o755)
    said = submit(
        *(cluster, run, "--gpus", "1", "--time", "10", "--chain", "3", "--stage"),
        *("--container", str(image), "--mounts", f"{tmp_path}:{tmp_path}"),
        TMPDIR="/mnt",
        PATH=f"{stand_in.parent}:{os.environ['PATH']}",
    )
    (kept,) = (run.folder / "submissions").iterdir()
    numbers = (kept / "jobs.txt").read_text().split()
    assert f"submitted    {' '.join(numbers)}; configuration, revision and changes are kept in {kept}" in said
    first, second, third = (Job(cluster, number, run.folder / "slurm" / f"run-{number}.out") for number in numbers)
    first.wait_until("training", lambda: run.step >= 10)
    status = cluster.run(sys.executable, "launch/status.py", str(run.folder))
    assert "training on n1, seen" in status
    assert f"job {first.number}: RUNNING on n[1-2]" in status
    first.signal_batch("USR1")
    first.wait_until("stopped", lambda: bool(run.events("stopped")))
    snapshot = Run(run.folder, kept / "config.toml")
    stopped = run.events("stopped")[0]["step"]
    snapshot.end_at(stopped + 10)
    assert [job.wait() for job in (first, second, third)] == ["COMPLETED"] * 3, second.output
    assert "saved and stopped; left to the job that follows" in first.output
    assert "finished already" in third.output
    assert [(event["step"], event["world_size"]) for event in run.events("started")] == [(0, 2), (stopped, 2)]
    assert checkpoint(run.folder, stopped + 10).exists()
    for node in ("n1", "n2"):
        shards = cluster.lab("enter", node, "find", "/mnt", "-path", "*/shards/*", "-type", "f").split()
        assert len(shards) == 3
    mounts = f"{REPOSITORY}:{REPOSITORY},{tmp_path}:{tmp_path}"
    containers = asked.read_text().splitlines()
    assert len(containers) == 3 + 2 * 2  # a preflight for each job, and the nodes of the two that trained
    assert all(line.startswith(f"exec --nv --bind {mounts} --pwd {REPOSITORY} {image} ") for line in containers)

    configuration = tomllib.loads((kept / "config.toml").read_text())
    assert configuration["train"]["global_batch"] == 8
    git = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    assert head in (kept / "revision.txt").read_text()
    assert "DDPM_REQUEUE=0" in (kept / "command.txt").read_text()
    said = submit(
        cluster, run, "--gpus", "1", "--time", "10", "--set", f"train.duration={stopped + 10} steps", expect=2
    )
    assert "is finished; a longer train.duration would go on" in said
    said = submit(
        cluster, run, "--gpus", "2", "--time", "10", "--dry-run", "--set", "train.duration=100M steps", "--chain", "2"
    )
    assert "on 2 processes, taken to grow with their number to 4): " in said
    assert "warning: --chain allows 2, so the run will not be complete at the end" in said


@pytest.mark.parametrize("kind", ["--chain", "--array"])
def test_a_failure_ends_what_would_follow(cluster: Cluster, run: Run, kind: str) -> None:
    """Jobs that wait for a failed one are taken out of the queue, and so are an array's later tasks."""
    held = ("--begin=now+1hour",)
    submit(cluster, run, "--gpus", "1", "--time", "10", kind, "3", "--", *held)
    (kept,) = (run.folder / "submissions").iterdir()
    (kept / "config.toml").write_text("nonsense")
    jobs = (kept / "jobs.txt").read_text().split()
    for job in jobs:
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    first = Job(cluster, jobs[0], run.folder / "slurm" / "of no use")
    first.wait_until("queue empty", lambda: not cluster.run("squeue", "--noheader"))
    (log,) = (run.folder / "slurm").iterdir()  # only one of them began
    assert "config.toml: not valid TOML" in log.read_text()
    assert "error: the preflight above says why" in log.read_text()
    states = [cluster.run("scontrol", "show", "job", "--oneliner", job) for job in jobs]
    assert "".join(states).count("JobState=FAILED") == 1
