"""Faults that a user can mend: each is one clear line, never a traceback."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ClassVar


class TrainerError(Exception):
    """Something outside the program is not as it must be; the message says what, where and what would be right.

    `on_every_rank`: all ranks raise it together, so that one of them speaks for all.
    """

    on_every_rank: ClassVar[bool] = False


class ConfigError(TrainerError):
    """A configuration that cannot be run; the message names the field, its value and what would be valid."""

    on_every_rank = True


class DataError(TrainerError):
    """A dataset or a sample that is not what its manifest promises; the message names the file and the sample."""


class CheckpointError(TrainerError):
    """A checkpoint that cannot be written, verified or resumed from; the message names it and the reason."""

    on_every_rank = True


class NonFiniteError(TrainerError):
    """Training diverged: more steps than allowed had a loss or a gradient that was not finite."""

    on_every_rank = True


def exit_clearly(main: Callable[[], int]) -> Callable[[], int]:
    """Make an entry point print a TrainerError as one line and return 2."""

    @functools.wraps(main)
    def guarded() -> int:
        try:
            return main()
        except TrainerError as error:
            if not error.on_every_rank or os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    return guarded
