"""Faults that a user can mend: each is one clear line, never a traceback."""

import functools
import sys
from collections.abc import Callable


class TrainerError(Exception):
    """Something outside the program is not as it must be; the message says what, where and what would be right."""


class ConfigError(TrainerError):
    """A configuration that cannot be run; the message names the field, its value and what would be valid."""


class DataError(TrainerError):
    """A dataset or a sample that is not what its manifest promises; the message names the file and the sample."""


class CheckpointError(TrainerError):
    """A checkpoint that cannot be written, verified or resumed from; the message names it and the reason."""


class NonFiniteError(TrainerError):
    """Training diverged: more steps than allowed had a loss or a gradient that was not finite."""


def exit_clearly(main: Callable[[], int]) -> Callable[[], int]:
    """Make an entry point print a TrainerError as one line, on the first rank that has it, and return 2."""

    @functools.wraps(main)
    def guarded() -> int:
        try:
            return main()
        except TrainerError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    return guarded
