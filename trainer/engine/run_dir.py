"""Classifies a folder before anything is written to it: whether it is or may become a run's, and its markers."""

import os
import re
from pathlib import Path

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.telemetry.files import read_bytes

# Files that only a run has: the first ones are made by a start, the last ones by submitting a job or indexing tars.
_OURS = ("events.jsonl", "heartbeat.json", "submissions", "indexes")
_CHECKPOINTS = re.compile(r"step-\d{8,}|quarantine|superseded|scores\.json|\.staging-.*")
# Files that the shell, the system, the launcher or the watchdog may create there before the run begins.
_HARMLESS = re.compile(
    r"\..*|lost\+found|nohup\.out|.*\.(?:log|out|err)|(?!config\.toml$).*\.toml"
    r"|slurm|wandb|flight|hangs|profiles|nonfinite"
)
_MOST_NAMED = 3
_MOST_BYTES = 200  # of a marker file


def check_run_dir(path: Path) -> None:
    """Raise ConfigError where the folder holds files other than a run's. Logs, dot files and TOML files are ignored."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ConfigError(f"run_dir = {path}: is no folder; choose another")
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as fault:
        raise ConfigError(f"run_dir = {path}: cannot be read ({fault.strerror})") from fault
    foreign = [name for name in names if not _HARMLESS.fullmatch(name)]
    if not foreign or is_run_dir(path):
        return
    named = ", ".join(repr(name) for name in foreign[:_MOST_NAMED])
    more = f" and {len(foreign) - _MOST_NAMED} more" if len(foreign) > _MOST_NAMED else ""
    raise ConfigError(
        f"run_dir = {path}: holds {named}{more} but no run, and a run would write among them; "
        "choose a folder that is new or empty"
    )


def is_run_dir(path: Path) -> bool:
    """Whether a run was started, submitted or imported there, even if it is damaged now."""
    if any((path / name).exists() for name in _OURS) or _is_lock(path / "lock") or _is_config(path / "config.toml"):
        return True
    checkpoints = path / "checkpoints"
    return checkpoints.is_dir() and any(_CHECKPOINTS.fullmatch(entry.name) for entry in checkpoints.iterdir())


def _is_lock(path: Path) -> bool:
    """Whether the file's content is a run's lock: its owner, or empty."""
    try:
        with path.open("rb") as stream:
            return path.is_file() and stream.read(8) in (b"", b"process ")
    except OSError:
        return False


def _is_config(path: Path) -> bool:
    try:
        Config.load(path)
    except ConfigError:
        return False
    return True


def marked_step(marker: Path) -> int | None:
    """The step in a DONE or STOPPED; None where there is no such file or it cannot be parsed."""
    try:
        first, *_ = read_bytes(marker)[:_MOST_BYTES].decode(errors="replace").splitlines()
        return int(first.removeprefix("step "))
    except (OSError, ValueError):
        return None
