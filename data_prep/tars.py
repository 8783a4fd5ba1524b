"""Tar archives as sources: entries and contents, with errors as InputError."""

import os
from functools import lru_cache
from io import FileIO
from pathlib import Path

from data_prep.errors import InputError
from data_prep.tar_headers import Member, TarError, walk

CACHED_ARCHIVES = 8


def entries(path: Path) -> list[Member]:
    """The archive's entries in order.

    Raises InputError where the file cannot be read, is damaged or truncated, or has data after its end mark.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return walk(descriptor)
        finally:
            os.close(descriptor)
    except TarError as error:
        raise InputError(f"{path}: {error}; restore the file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def content(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes of the archive at `offset`. Raises InputError where the file has become shorter."""
    try:
        data = os.pread(_opened(path).fileno(), length, offset)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; the source must stay as it is during a run") from error
    if len(data) != length:
        raise InputError(f"{path}: has become shorter; the source must stay as it is during a run")
    return data


@lru_cache(maxsize=CACHED_ARCHIVES)
def _opened(path: Path) -> FileIO:
    """Opened once per process; the file closes when it is dropped from the cache."""
    return FileIO(path)
