"""Faults that a user can mend: each is one clear line, never a traceback."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

_LONGEST_VALUE = 120


class TrainerError(Exception):
    """Something outside the program is not as it must be; the message says what, where and what would be right.

    `agreed`: all ranks raise it together, so that one of them speaks for all.
    """

    def __init__(self, message: str, *, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed

    def is_mine_to_tell(self) -> bool:
        """Whether this rank prints it: of ranks that say the same, only the first does."""
        return not self.agreed or os.environ.get("RANK", "0") == "0"


class ConfigError(TrainerError):
    """A configuration that cannot be run; the message names the field, its value and what would be valid."""

    def is_mine_to_tell(self) -> bool:
        """The ranks of a node read the same file."""
        return super().is_mine_to_tell() and os.environ.get("LOCAL_RANK", "0") == "0"


class DataError(TrainerError):
    """A dataset or a sample that is not what its manifest promises; the message names the file and the sample."""


class SampleError(DataError):
    """One sample that is damaged, while its dataset is there: what `data.on_bad_sample` is about."""


class CheckpointError(TrainerError):
    """A checkpoint that cannot be written, verified or resumed from; the message names it and the reason."""


class ConversionError(TrainerError):
    """Another program's weights or settings that this network cannot take, or ours that it cannot; the message names
    the tensor or the field.
    """


class NonFiniteError(TrainerError):
    """Training diverged: more steps than allowed had a loss or a gradient that was not finite."""


def brief(value: Any) -> str:
    """A value of somebody else's in a message: as Python writes it, which is printable, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def exit_clearly(main: Callable[[], int]) -> Callable[[], int]:
    """Make an entry point print a TrainerError as one line and return 2."""

    @functools.wraps(main)
    def guarded() -> int:
        try:
            return main()
        except TrainerError as error:
            if error.is_mine_to_tell():
                print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    return guarded
