"""Tar archives as sources: their entries, or what is wrong with the file."""

import os
from pathlib import Path

from data_prep.errors import InputError
from data_prep.tar_headers import Member, TarError, walk


def entries(path: Path) -> list[Member]:
    """The archive's entries in their order.

    Raises InputError where the file cannot be read, is damaged or cut, or goes on behind what looks like its end.
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
