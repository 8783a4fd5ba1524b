"""Status of a run on one screen: `python launch/status.py runs/lsun256`."""

import sys
from pathlib import Path

if not __package__:  # run by path, Python has launch/ first in sys.path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import re
import subprocess
import time
from typing import Any

from launch.outlook import measured_outlook
from trainer.config import Config
from trainer.engine.checkpointing import sealed
from trainer.errors import ConfigError, exit_clearly
from trainer.telemetry.files import read_bytes
from trainer.telemetry.goodput import Goodput, add_up, read_events
from trainer.telemetry.heartbeat import read_heartbeat
from trainer.telemetry.liveness import state
from trainer.telemetry.metrics import read_metrics
from trainer.units import in_words

_STEP = re.compile(r"step-(\d{8,})")
_WORTH_TELLING = ("nonfinite", "quarantined", "bad_sample", "slow_rank", "hang", "died")


@exit_clearly
def main() -> int:
    """Read the run's folder, query SLURM if it is installed, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--no-verify", action="store_true", help="do not read the last checkpoint to verify it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    rows = describe(arguments.run, verify=not arguments.no_verify)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        width = max(map(len, rows))
        print("\n".join(f"{name:<{width}}  {text}" for name, text in rows.items()))
    return 0


def describe(run: Path, *, verify: bool = True) -> dict[str, str]:
    """The rows of the status. Raises ConfigError where the folder is not a run's."""
    if not (run / "config.toml").is_file() and not list(run.glob("submissions/*/config.toml")):
        raise ConfigError(f"{run}: holds no config.toml, so it is no run's folder")
    events, heartbeat, records = read_events(run), read_heartbeat(run), read_metrics(run / "logs")
    goodput = add_up(events, heartbeat)
    newest = max(run.glob("submissions/*/config.toml"), default=None, key=lambda path: path.stat().st_mtime)
    config = Config.load(run / "config.toml" if (run / "config.toml").is_file() or newest is None else newest)
    job = job_of(run, heartbeat)
    queued = in_queue(job) if job is not None else None
    told = f"; job {job}: {queued}" if queued else ""
    rows = {"run": str(run), "state": f"{state(run, heartbeat, events)}{told}"}
    step = max([int(record["step"]) for record in records] + [heartbeat["step"] if heartbeat else 0])
    last = config.train.duration.steps(config.train.global_batch)
    rows["step"] = f"{step:,} of {last:,} ({step / last:.1%}), {step * config.train.global_batch:,} images"
    if records:
        latest = records[-1]
        rows["speed"] = f"{latest.get('train/images_per_second', 0):,.1f} images/s"
        rows["loss"] = f"{latest['train/loss']:.5f} at step {latest['step']:,}" if "train/loss" in latest else "-"
    outlook = measured_outlook(config.model_copy(update={"run_dir": str(run)}))
    if outlook is not None and step < last:
        left = outlook.seconds_on(outlook.world_size)
        at = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + left))
        rows["ETA"] = f"{in_words(left)} of training on {outlook.world_size} processes; {at} if nothing intervenes"
    rows["checkpoint"] = newest_checkpoint(run / "checkpoints", verify=verify)
    rows["starts"] = starts(goodput)
    rows["time"] = where_the_time_went(goodput)
    rows |= faults(events)
    return rows


def job_of(run: Path, heartbeat: dict[str, Any] | None) -> str | None:
    """The SLURM job that trained last, otherwise the one submitted last; None where none is recorded."""
    attempt = (heartbeat or {}).get("attempt")
    if attempt:
        return str(attempt).partition(".")[0]
    submitted = sorted(run.glob("submissions/*/jobs.txt"), key=lambda path: path.stat().st_mtime)
    try:
        return read_bytes(submitted[-1]).decode().split()[0] if submitted else None
    except (OSError, UnicodeDecodeError, IndexError):
        return None


def in_queue(job: str) -> str | None:
    """State of a job according to squeue; None where the job is not listed or SLURM is not installed."""
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%T|%N|%L|%r"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0 or not answer.stdout.strip():
        return "not in the queue" if answer.returncode == 0 or "Invalid job id" in answer.stderr else None
    status, nodes, left, reason = answer.stdout.strip().splitlines()[0].split("|")
    return f"{status} on {nodes}, {left} left" if nodes else f"{status} ({reason})"


def newest_checkpoint(folder: Path, *, verify: bool) -> str:
    """The newest checkpoint, its age, and whether it is undamaged."""
    steps = {int(match[1]): path for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name))}
    if not steps:
        return "none yet"
    step, newest = max(steps.items())
    text = f"step {step:,}, {in_words(time.time() - newest.stat().st_mtime)} old, {len(steps)} kept"
    if not verify:
        return text
    try:
        manifest = sealed.read_manifest(newest)
        for record in manifest["files"]:
            sealed.verify_file(newest, record)
    except (sealed.DamagedError, OSError) as fault:
        return f"{text}; DAMAGED: {fault}; the next start takes the one before"
    size = sum(record.bytes for record in manifest["files"])
    return f"{text}; verified, {size / 2**20:,.1f} MiB in {len(manifest['files'])} parts"


def starts(goodput: Goodput) -> str:
    """Number of starts, and how they ended."""
    text = f"{goodput.starts}, of which {goodput.stopped} were stopped on request and {goodput.died} died"
    return f"{text}; {goodput.lost_steps:,} steps were done twice" if goodput.lost_steps else text


def where_the_time_went(goodput: Goodput) -> str:
    """Shares of the time since the first start, by activity."""
    if not goodput.total:
        return "-"
    parts = sorted(goodput.seconds.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {goodput.share(name):.1%}" for name, _ in parts)
    return f"{shares} of {in_words(goodput.total)}"


def faults(events: list[dict[str, Any]]) -> dict[str, str]:
    """Number of faults of each kind, and the last one."""
    found = {}
    for name in _WORTH_TELLING:
        if those := [event for event in events if event["event"] == name]:
            about = ", ".join(f"{k} {v}" for k, v in those[-1].items() if k not in ("event", "time"))
            ago = in_words(time.time() - those[-1]["time"])
            found[name] = f"{len(those)}, the last {ago} ago: {about}"
    return found


if __name__ == "__main__":
    sys.exit(main())
