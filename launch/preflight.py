"""Checks before the nodes start, for errors that would occur on all of them, and a log of their environment.

`python -m launch.preflight --config TOML [--set ...]` prints two lines, the run's folder and whether the run is
"finished" or "unfinished", and everything else on the standard error.
"""

import argparse
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from trainer.config import Config
from trainer.engine.checkpointing.sealed import DamagedError, read_manifest
from trainer.engine.run_dir import check_run_dir, marked_step
from trainer.errors import exit_clearly

REPOSITORY = Path(__file__).resolve().parent.parent
_TOLD = ("NCCL_", "TORCH_", "GLOO_", "FI_", "UCX_", "OMP_", "CUDA_", "DDPM_")


@exit_clearly
def main() -> int:
    """Check and report. Exits with status 2 and a line where the run cannot begin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    arguments, _ = parser.parse_known_args()  # the others are options of the trainer
    config = Config.load(arguments.config, arguments.set)
    check_run_dir(Path(config.run_dir))
    report()
    print(Path(config.run_dir).absolute())
    print("finished" if is_finished(config) else "unfinished")
    return 0


def is_finished(config: Config) -> bool:
    """Whether the run has reached its configured duration and the last checkpoint exists.

    A duration that was increased since is not reached yet.
    """
    run = Path(config.run_dir)
    done = marked_step(run / "DONE")
    if done is None or done < config.train.duration.steps(config.train.global_batch):
        return False
    try:
        read_manifest(run / "checkpoints" / f"step-{done:08d}")
    except (DamagedError, OSError):
        return False
    return True


def report() -> None:
    """Print code revision, software, machine and environment to the standard error."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "accelerate"))
    lines = [
        f"code: {REPOSITORY} at {revision()}",
        f"software: Python {platform.python_version()} ({sys.executable}), {versions}",
        f"machine: {platform.node()}, {platform.system()} {platform.release()}",
        *(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_TOLD)),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def revision() -> str:
    """The commit, marked if files differ from it; a message where there is no git."""
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return "an unknown revision (no git repository)"
    return f"{commit.strip()}{' with changes' if git('status', '--porcelain', '--untracked-files=no') else ''}"


def git(*arguments: str) -> str | None:
    """Output of a git command in the repository; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
