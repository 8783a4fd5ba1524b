"""How long a stop can take, from what there is to write: what --grace must leave of a time limit."""

import math

from trainer.config import Config

BYTES_PER_SECOND = 500e6  # of a shared file system, all ranks together; of a copy elsewhere a fifth
_NOTICE = 15.0  # seconds until every rank knows, and until SLURM and the launchers have seen that all have ended
_LEAST, _ROUND = 120, 30
_PASSES = 3  # written, hashed, read back and compared


def seconds_to_stop(config: Config, checkpoint_bytes: int, *, step_seconds: float = 0.0) -> int:
    """Seconds from a signal to the end of a job, generously, and 120 at least.

    The signal is heeded after the step, or the call of the network, in which it arrives, `step_seconds` at most where
    a step has been timed. A checkpoint that is just being written comes first, then one of the last step; then those
    that stay are read again, if others go. What is copied elsewhere is waited for.
    """
    save = _PASSES * checkpoint_bytes / BYTES_PER_SECOND
    reread = config.checkpoint.keep * checkpoint_bytes / BYTES_PER_SECOND
    copy = 5 * checkpoint_bytes / BYTES_PER_SECOND if config.checkpoint.copy_to is not None else 0.0
    seconds = 2 * _NOTICE + 2 * step_seconds + 2 * save + reread + 2 * copy
    return max(_LEAST, math.ceil(seconds / _ROUND) * _ROUND)
