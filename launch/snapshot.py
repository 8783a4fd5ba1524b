"""A record of each submission in the run's folder: configuration, code revision and uncommitted changes.

RUN/submissions/20261124-220154/config.toml     as resolved; the job reads this copy, so the original may be edited
                                revision.txt    the commit, and untracked files
                                changes.diff    differences from the commit, for git apply
                                command.txt     the command that submitted it
"""

import time
from pathlib import Path

from launch.preflight import git, revision
from trainer.config import Config
from trainer.errors import TrainerError


def take_snapshot(config: Config) -> Path:
    """Create the folder of a submission; returns it. Raises TrainerError where it cannot be written."""
    parent = Path(config.run_dir) / "submissions"
    try:
        folder = _new_folder(parent)
        (folder / "config.toml").write_text(config.to_toml())
        unknown = git("ls-files", "--others", "--exclude-standard") or ""
        untracked = f"\nfiles that git does not know:\n{unknown}" if unknown else ""
        (folder / "revision.txt").write_text(f"{revision()}\n{untracked}")
        (folder / "changes.diff").write_text(git("diff", "--binary", "HEAD") or "")
    except OSError as error:
        raise TrainerError(f"{parent}: cannot be written ({error})") from error
    return folder


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):  # for several submissions within a second
        folder = parent / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / name}")
