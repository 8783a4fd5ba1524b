"""How a host's cores are divided among its processes: intra-op threads and data-loading processes."""

import os
from collections.abc import Mapping, Sequence

import psutil
import torch

from data_prep.cores import available_cores
from trainer.world import local_world_size

_LAUNCHER = os.getppid()  # at import: the launcher's pid, if there is a launcher
_MOST_LOADERS = 4  # per process, where data.workers is not set
_THREADS_OPTION = "--num_cpu_threads_per_process"


def own_cores() -> int:
    """Cores per process of this host, rounded down, at least 1."""
    return max(1, available_cores() // (local_world_size() or 1))


def loader_processes(asked: int | None) -> int:
    """`data.workers`; where that is not set, 4 or the number of cores per process, whichever is smaller."""
    return asked if asked is not None else min(_MOST_LOADERS, own_cores())


def set_threads() -> None:
    """Set torch's number of threads: the user's OMP_NUM_THREADS, otherwise one per core of this process's share.

    With GPUs, never more than torch's default.
    """
    threads = threads_asked_for(os.environ, *_launcher()) or own_cores()
    torch.set_num_threads(min(threads, torch.get_num_threads()) if torch.cuda.is_available() else threads)


def threads_asked_for(
    environ: Mapping[str, str], launcher_environ: Mapping[str, str] | None, launcher_command: Sequence[str]
) -> int | None:
    """The user's OMP_NUM_THREADS; None where it is not set, or was set by a launcher.

    torchrun and accelerate set it for their workers, usually to 1, whatever the number of cores. It counts as the
    user's if it is in the launcher's own environment, or was given by accelerate's option for it. `launcher_environ` is
    None where it cannot be read; a value of 1 then counts as the launcher's.
    """
    first = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # further numbers: nested parallelism
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
    """The parent process's environment (None where it may not be read) and its command line."""
    try:
        launcher = psutil.Process(_LAUNCHER)
        return launcher.environ(), launcher.cmdline()
    except psutil.Error:
        return None, ()
