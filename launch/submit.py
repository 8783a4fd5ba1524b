"""Check a run, then submit it to SLURM: `python launch/submit.py configs/lsun256.toml --nodes 8 --gpus 8 --time 1-00`.

The job is requeued after time limits, preemption and node failures until the run is complete (launch/train.sbatch).
Options after -- are passed to sbatch: `... --time 1-00 -- --account=vision --exclude=n7`.
"""

import sys
from pathlib import Path

if not __package__:  # run by path, Python has launch/ first in sys.path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import re
import shlex
import subprocess

from launch.grace import BYTES_PER_SECOND, seconds_to_stop
from launch.outlook import measured_outlook, parse_time, stretches
from launch.preflight import REPOSITORY, is_finished
from launch.snapshot import take_snapshot
from trainer.arguments import at_least_one
from trainer.config import Config
from trainer.engine.planning.dry_run import as_text, describe_run
from trainer.engine.run_dir import check_run_dir
from trainer.errors import ConfigError, TrainerError, exit_clearly
from trainer.launcher.settle import load_settled
from trainer.units import in_words

SCRIPT = REPOSITORY / "launch" / "train.sbatch"


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's configuration")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="override one field")
    parser.add_argument("--nodes", type=at_least_one, required=True, metavar="N")
    parser.add_argument("--gpus", type=int, required=True, metavar="G", help="of each node; 0 trains on its CPUs")
    parser.add_argument("--processes", type=at_least_one, metavar="P", help="of each node (default: its GPUs, or 1)")
    parser.add_argument("--time", required=True, metavar="T", help="limit of a job as sbatch takes it: 24:00:00, 1-00")
    parser.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    parser.add_argument(
        "--grace", type=at_least_one, metavar="SECONDS", help="to save in (default: computed, see docs/cluster.md)"
    )
    parser.add_argument("--max-restarts", type=at_least_one, default=100, metavar="K", help="requeues (default 100)")
    parser.add_argument(
        "--elastic-restarts",
        type=int,
        default=0,
        metavar="K",
        help="how often trainers, if one fails, are started again within a job (default 0)",
    )
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--chain",
        type=at_least_one,
        metavar="K",
        help="K jobs one after the other, where jobs may not requeue themselves; each is over with its time limit, and "
        "a failure or a scancel ends the chain",
    )
    several.add_argument(
        "--array", type=at_least_one, metavar="K", help="the same as one job array, one task at a time"
    )
    parser.add_argument("--stage", action="store_true", help="read shards from copies on a disk of each node")
    parser.add_argument("--container", metavar="IMAGE", help="a file for apptainer, or a reference for pyxis")
    parser.add_argument("--mounts", metavar="A:A,B:B", help="folders that are visible in the container")
    parser.add_argument("--dry-run", action="store_true", help="check, print what would be submitted, and stop")
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    arguments.sbatch = options
    for name in ("gpus", "elastic_restarts"):
        if getattr(arguments, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: should be at least 0")
    if arguments.mounts and not arguments.container:
        parser.error("--mounts goes with --container")
    return arguments


@exit_clearly
def main() -> int:
    """Parse, check and submit."""
    arguments = parse_arguments()
    config, _ = load_settled(arguments.config, arguments.set, {}, gpus=False)  # node.sh passes no options to accelerate
    processes = arguments.nodes * processes_per_node(arguments)
    plan, fault = describe_run(config, world_size=processes)
    print(as_text(plan))
    if fault is not None:
        raise fault
    print(grace_text(config, arguments, int(plan["checkpoint_bytes"]), processes))
    print(outlook_text(config, arguments, processes))
    check_run_dir(Path(config.run_dir))
    if is_finished(config):
        raise ConfigError(f"run_dir = {config.run_dir}: is finished; a longer train.duration would go on")

    check_partition(arguments)
    settings, options = environment(arguments), sbatch_options(config, arguments)
    ask_slurm(options, settings)
    if arguments.dry_run:
        folder = Path(config.run_dir) / "submissions" / "..."
        print(f"would submit:\n{in_shell(settings, job_command(options, folder))}")
        return 0
    folder = take_snapshot(config)
    (Path(config.run_dir) / "slurm").mkdir(exist_ok=True)
    command = job_command(options, folder)
    (folder / "command.txt").write_text(in_shell(settings, command) + "\n")
    print(f"submitting:\n{in_shell(settings, command)}")
    jobs = submit(command, settings, times=arguments.chain or 1)
    (folder / "jobs.txt").write_text(" ".join(jobs) + "\n")
    print(how_to_follow(config, jobs, folder))
    return 0


def processes_per_node(arguments: argparse.Namespace) -> int:
    """As given, otherwise one per GPU."""
    return int(arguments.processes or arguments.gpus or 1)


def grace_text(config: Config, arguments: argparse.Namespace, checkpoint_bytes: int, processes: int) -> str:
    """A line with the estimated time to stop, and --grace, which is set from it unless given."""
    outlook = measured_outlook(config)
    step = outlook.seconds_a_step(config.train.global_batch, processes) if outlook is not None else 0.0
    needed = seconds_to_stop(config, checkpoint_bytes, step_seconds=step)
    if arguments.grace is None:
        arguments.grace = needed
    rate = f"at {BYTES_PER_SECOND / 1e6:.0f} MB/s"
    text = f"grace        {arguments.grace} s; a stop with two checkpoints {rate} takes up to {needed} s"
    if arguments.grace < needed:
        text += f"\nwarning: --grace {arguments.grace}: on a slow disk the time limit may come before the save is done"
    return text


def outlook_text(config: Config, arguments: argparse.Namespace, processes: int) -> str:
    """A line with the remaining time at the measured speed, and the limit. Raises ConfigError for a limit that is too
    short.
    """
    limit = parse_time(arguments.time)
    if limit <= arguments.grace:
        raise ConfigError(
            f"--time {arguments.time}: is not longer than the {arguments.grace} s of --grace, which a job needs to save"
        )
    outlook = measured_outlook(config)
    if outlook is None:
        return "time left    unknown: the run has not been logged yet"
    left = outlook.seconds_on(processes)
    starts = stretches(left, limit=limit, grace=arguments.grace)
    basis = f"{outlook.images_per_second:,.1f} images/s on {outlook.world_size} processes"
    if outlook.world_size != processes:
        basis += f", taken to grow with their number to {processes}"
    text = f"time left    {in_words(left)} ({basis}): {starts} jobs of {arguments.time}"
    allowed = arguments.chain or arguments.array or arguments.max_restarts + 1
    if starts > allowed:
        name = "--chain" if arguments.chain else "--array" if arguments.array else "--max-restarts"
        text += f"\nwarning: {name} allows {allowed}, so the run will not be complete at the end"
    return text


def check_partition(arguments: argparse.Namespace) -> None:
    """Raise ConfigError where a job would wait in the partition forever: most clusters queue jobs that exceed its
    limits.
    """
    answer = _slurm(["scontrol", "show", "partition", "--oneliner"], {})
    partitions = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in answer.stdout.splitlines()]
    for partition in partitions:
        name = partition.get("PartitionName")
        if name == arguments.partition or (arguments.partition is None and partition.get("Default") == "YES"):
            break
    else:
        known = ", ".join(partition.get("PartitionName", "") for partition in partitions)
        raise ConfigError(f"--partition {arguments.partition}: no such partition; there are: {known}")
    if partition.get("State") != "UP":
        raise ConfigError(f"--partition {name}: is {partition.get('State')}")
    longest = partition.get("MaxTime", "UNLIMITED")
    if longest != "UNLIMITED" and parse_time(arguments.time) > parse_time(longest):
        raise ConfigError(
            f"--time {arguments.time}: partition {name} allows {longest}; a job goes on by itself after it"
        )
    for limit in ("MaxNodes", "TotalNodes"):
        most = partition.get(limit, "UNLIMITED")
        if most.isdigit() and arguments.nodes > int(most):
            raise ConfigError(f"--nodes {arguments.nodes}: partition {name} has {limit} = {most}")


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Environment variables for launch/train.sbatch."""
    requeues, processes = not (arguments.chain or arguments.array), processes_per_node(arguments)
    in_venv = sys.prefix != sys.base_prefix and arguments.container is None
    settings = {
        "DDPM_REPO": REPOSITORY,
        "DDPM_VENV": sys.prefix if in_venv else None,
        "DDPM_PROCS_PER_NODE": processes if processes != arguments.gpus else None,
        "DDPM_REQUEUE": None if requeues else "0",
        "DDPM_MAX_RESTARTS": arguments.max_restarts if requeues else None,
        "DDPM_ELASTIC_RESTARTS": arguments.elastic_restarts or None,
        "DDPM_STAGE": "1" if arguments.stage else None,
        "DDPM_CONTAINER": arguments.container or None,
        "DDPM_CONTAINER_MOUNTS": arguments.mounts or None,
    }
    return {name: str(value) for name, value in settings.items() if value is not None}


def sbatch_options(config: Config, arguments: argparse.Namespace) -> list[str]:
    """Options for sbatch; the user's come last, since sbatch uses the last of several values."""
    run = Path(config.run_dir).absolute()
    log = str(run / "slurm").replace("%", "%%") + ("/%x-%A_%a.out" if arguments.array else "/%x-%j.out")
    options = {
        "job-name": run.name,
        "nodes": arguments.nodes,
        "time": arguments.time,
        "signal": f"B:USR1@{arguments.grace}",
        "output": log,
        "chdir": REPOSITORY,
        "gpus-per-node": arguments.gpus or None,
        "partition": arguments.partition or None,
        "array": f"1-{arguments.array}%1" if arguments.array else None,
    }
    return [*(f"--{name}={value}" for name, value in options.items() if value is not None), *arguments.sbatch]


def job_command(options: list[str], folder: Path) -> list[str]:
    """The command that submits the job, with the snapshot's configuration."""
    return ["sbatch", "--parsable", *options, str(SCRIPT), "--config", str(folder.absolute() / "config.toml")]


def ask_slurm(options: list[str], settings: dict[str, str]) -> None:
    """Raise ConfigError with SLURM's reason where it rejects the job: partition, limit, nodes, GPUs, account."""
    answer = _slurm(["sbatch", "--test-only", *options, str(SCRIPT)], settings)
    lines = [line.removeprefix("sbatch: ") for line in answer.stderr.splitlines() if line.startswith("sbatch: ")]
    if answer.returncode != 0:
        raise ConfigError(f"sbatch would refuse this job: {'; '.join(lines) or answer.stderr.strip()}")
    print(f"SLURM        {'; '.join(lines)}")


def submit(command: list[str], settings: dict[str, str], *, times: int) -> list[str]:
    """Submit the job, or a chain in which each begins after the one before has succeeded. Returns the job numbers."""
    jobs: list[str] = []
    for _ in range(times):
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        answer = _slurm([*command[:2], *after, *command[2:]], settings)
        if answer.returncode != 0:
            submitted = f"; already submitted: {' '.join(jobs)}" if jobs else ""
            raise TrainerError(f"{answer.stderr.strip()}{submitted}")
        jobs.append(answer.stdout.strip().splitlines()[-1].split(";")[0])
    return jobs


def in_shell(settings: dict[str, str], command: list[str]) -> str:
    """The command as typed in a shell."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in settings.items()), shlex.join(command)])


def how_to_follow(config: Config, jobs: list[str], folder: Path) -> str:
    """Commands for following the job."""
    logs = shlex.quote(str(Path(config.run_dir) / "slurm"))
    return f"""submitted    {" ".join(jobs)}; configuration, revision and changes are kept in {folder}
look         python launch/status.py {shlex.quote(config.run_dir)}
             squeue --jobs={",".join(jobs)}
             tail -F {logs}/*-{jobs[0]}*.out
save, go on  scancel --batch --signal=USR1 {jobs[0]}
save, end    scancel {" ".join(jobs)}"""


def _slurm(command: list[str], settings: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise TrainerError(f"{command[0]}: not found; this is for a login node of a SLURM cluster") from error


if __name__ == "__main__":
    sys.exit(main())
