"""Reading the files of a source: their magic bytes, parts of them, and the errors that all kinds of sources share."""

import os
from functools import lru_cache
from io import FileIO
from pathlib import Path

from data_prep.errors import InputError, Reject

MAX_FILE_BYTES = 256 * 1024**2  # bytes; files are read into memory whole, and no useful image is larger
CACHED_FILES = 8


def begins_with(path: Path, magic: bytes, *, at: int = 0) -> bool:
    """Whether the file has these bytes at offset `at`."""
    with path.open("rb") as stream:
        return stream.read(at + len(magic))[at:] == magic


def read_at(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes of the file at `offset`, fewer where it ends before. Raises InputError where reading fails."""
    try:
        return os.pread(_opened(path).fileno(), length, offset)
    except OSError as error:
        raise has_changed(path, str(error.strerror)) from error


def check_length(length: int) -> None:
    """Raise Reject for a file that is too large."""
    if length > MAX_FILE_BYTES:
        raise Reject("file too large", f"{length} bytes")


def has_changed(path: Path, fault: str) -> InputError:
    """The error for a source that does not stay as it was when it was opened."""
    return InputError(f"{path}: {fault}; the source must stay as it is during a run")


@lru_cache(maxsize=CACHED_FILES)
def _opened(path: Path) -> FileIO:
    """Opened once per process; the file closes when it is dropped from the cache."""
    return FileIO(path)
