"""What a submission ran: configuration, code revision and changes, kept in the run's folder.

RUN/submissions/20261124-220154/config.toml     as resolved; the job reads this one, whatever becomes of the original
                                revision.txt    the commit, and files that git does not know
                                changes.diff    what differed from the commit; git apply brings it back
                                command.txt     the command that submitted it
"""

import time
from pathlib import Path

from launch.preflight import git, revision
from trainer.config import Config
from trainer.errors import TrainerError


def take_snapshot(config: Config) -> Path:
    """Make the folder of a submission; returns it. Raises TrainerError where it cannot be written."""
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
    for number in range(1000):  # several in one second
        folder = parent / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / name}")
