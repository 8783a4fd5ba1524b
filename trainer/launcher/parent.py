"""The launcher whose worker this process is: the worker ends with it. Nothing is imported here that takes time."""

import os
import signal
from pathlib import Path

from trainer.errors import TrainerError
from trainer.signals import on_parents_death

_MARKS = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}  # torchrun's, accelerate's
_INIT = 1
PROCESS = "DDPM_LAUNCHER_PID"  # launch/node.sh, which becomes the launcher, says its number

_parent = os.getppid()  # when this module was imported


def end_with_launcher() -> int:
    """Ask the kernel for a SIGTERM when the parent dies: workers of a killed launcher would train on as orphans.

    Started by hand, from a shell that may be closed, nothing is asked for. Returns 0, for `exit_clearly`. Raises
    TrainerError where the launcher has died before.
    """
    if not _MARKS & os.environ.keys():
        return 0
    on_parents_death(signal.SIGTERM)
    if os.getppid() != _parent or _is_adopted():  # it died before the call
        raise TrainerError("the launcher is gone")
    return 0


def _is_adopted() -> bool:
    """Whether the parent was another when this process began.

    Without the launcher's number: whether it is init, and no Python, for in a container the launcher may be init.
    """
    if PROCESS in os.environ:
        return os.environ[PROCESS] != str(_parent)
    return _parent == _INIT and not _is_python(_INIT)


def _is_python(process: int) -> bool:
    try:
        return b"python" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False
