"""Faults that a user can mend: each is one clear line, never a traceback."""

import contextlib
import functools
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.world import local_rank, rank

_LONGEST_VALUE = 120
_SIGPIPE = 128 + signal.SIGPIPE


class TrainerError(Exception):
    """Something outside the program is not as it must be; the message says what, where and what would be right.

    `agreed`: all ranks raise it together, so that one of them speaks for all.
    """

    def __init__(self, message: str, *, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed

    def is_mine_to_tell(self) -> bool:
        """Whether this rank prints it: of ranks that say the same, only the first does."""
        return not self.agreed or rank() == 0


class ConfigError(TrainerError):
    """A configuration that cannot be run; the message names the field, its value and what would be valid."""

    def is_mine_to_tell(self) -> bool:
        """The ranks of a node read the same file."""
        return super().is_mine_to_tell() and local_rank() == 0


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


def printable(text: str) -> str:
    """For a terminal: control characters (escape sequences), lone surrogates and the like as Python writes them.

    Line ends and tabs stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def exit_clearly(main: Callable[[], int]) -> Callable[[], int]:
    """Make an entry point print a TrainerError as one line and return 2.

    Nor does it end in a traceback where a name cannot be printed in the user's locale, where a file cannot be had, or
    where what it prints is not read to the end (`| head`): then it returns what a shell reports for SIGPIPE.
    """

    @functools.wraps(main)
    def guarded() -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                return main()
            finally:
                sys.stdout.flush()  # here, where a pipe that is closed can still be told from a fault
        except TrainerError as error:
            if error.is_mine_to_tell():
                _tell(str(error))
            return 2
        except BrokenPipeError:
            if not _nobody_reads():
                raise
            return _SIGPIPE
        except OSError as error:
            if error.filename is None or error.strerror is None:
                raise
            _tell(f"{error.filename}: {error.strerror}")
            return 2
        finally:
            remove_launcher_folders()

    return guarded


def remove_launcher_folders() -> None:
    """Remove what torchrun and `accelerate launch` leave of this rank in the temporary folder, where it is empty."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # torchelastic_.../RUN/attempt_0/RANK/error.json
    folders = list(Path(error_file).parents)[:4]
    if len(folders) < 4 or not folders[-1].name.startswith("torchelastic_"):
        return
    with contextlib.suppress(OSError):  # another rank's, or its log, is still there
        for folder in folders:
            folder.rmdir()


def _tell(message: str) -> None:
    line = printable(message).replace("\n", "\\n")
    print(f"error: {line}", file=sys.stderr, flush=True)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose other end is closed; from then on what is written to it goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return True
