"""Estimate of the time that stopping a job takes, from the bytes to write: the lower bound for --grace."""

import math

from trainer.config import Config

BYTES_PER_SECOND = 500e6  # of a shared file system, over all ranks; a mirror has a fifth of it
_NOTICE = 15.0  # seconds until all ranks have the signal, and until SLURM and the launchers notice their exit
_LEAST, _ROUND = 120, 30
_PASSES = 3  # write, hash, read back, compare


def seconds_to_stop(config: Config, checkpoint_bytes: int, *, step_seconds: float = 0.0) -> int:
    """A generous estimate of the seconds from a signal to the end of a job, at least 120.

    The signal takes effect after the current step, or call of the network: within `step_seconds`, where steps have been
    timed. Then a pending async save completes, the last step is saved, retention verifies the checkpoints to be kept,
    if others are to be deleted, and uploads to the mirror complete.
    """
    save = _PASSES * checkpoint_bytes / BYTES_PER_SECOND
    reread = config.checkpoint.keep * checkpoint_bytes / BYTES_PER_SECOND
    copy = 5 * checkpoint_bytes / BYTES_PER_SECOND if config.checkpoint.copy_to is not None else 0.0
    seconds = 2 * _NOTICE + 2 * step_seconds + 2 * save + reread + 2 * copy
    return max(_LEAST, math.ceil(seconds / _ROUND) * _ROUND)
