"""A process's share of the cores: threads of its arithmetic, and processes that load its data."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from data_prep.cores import available_cores

_LAUNCHER = os.getppid()  # when this module was imported: the launcher, if there is one
_MOST_LOADERS = 4  # for a process, where data.workers is left out
_THREADS_OPTION = "--num_cpu_threads_per_process"


def own_cores() -> int:
    """Whole cores for each process of this host, at least 1."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def loader_processes(asked: int | None) -> int:
    """`data.workers`, or where it is left out 4, but no more than the process has cores."""
    return asked if asked is not None else min(_MOST_LOADERS, own_cores())


def set_threads() -> None:
    """Let torch compute with as many threads as the user asks for by OMP_NUM_THREADS, else with one for each core.

    Where GPUs compute, never with more than torch would take anyway.
    """
    threads = threads_asked_for(os.environ, *_launcher()) or own_cores()
    torch.set_num_threads(min(threads, torch.get_num_threads()) if torch.cuda.is_available() else threads)


def threads_asked_for(
    environ: Mapping[str, str], launcher_environ: Mapping[str, str] | None, launcher_command: Sequence[str]
) -> int | None:
    """The OMP_NUM_THREADS that the user has set; None where there is none, or a launcher has made it up.

    torchrun and accelerate set it, mostly to 1, for processes that they start, whatever the number of cores. The user
    set it if the launcher itself was started with it, or with accelerate's option for it. `launcher_environ` is None
    where that cannot be seen: then 1 is taken for the launcher's.
    """
    first = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # further numbers are of nested threads
    threads = int(first) if first.isascii() and first.isdigit() else 0
    if threads == 0:
        return None
    is_launched = not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}.isdisjoint(environ)
    if not is_launched:
        return threads
    if launcher_environ is None:
        return threads if threads > 1 else None
    by_option = any(argument.partition("=")[0] == _THREADS_OPTION for argument in launcher_command)
    return threads if by_option or "OMP_NUM_THREADS" in launcher_environ else None


def _launcher() -> tuple[Mapping[str, str] | None, Sequence[str]]:
    """What the parent process was started with: environment, None where it may not be read, and command line."""
    try:
        environment = Path(f"/proc/{_LAUNCHER}/environ").read_bytes()
        command = Path(f"/proc/{_LAUNCHER}/cmdline").read_bytes()
    except OSError:
        return None, ()
    pairs = (entry.decode(errors="replace").partition("=") for entry in environment.split(b"\0"))
    return {name: value for name, _, value in pairs if name}, command.decode(errors="replace").split("\0")
