"""The output folder: exclusive access, and atomic writing of files."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_prep.errors import DataPrepError, InputError
from data_prep.format import CONTACT_SHEET_NAME, INDEX_NAME, MANIFEST_NAME, NAMES_NAME, REJECTS_NAME, STATS_NAME

STAGING_NAME = ".staging"
LOCK_NAME = "lock"

WRITE_BUFFER = 1 << 20  # bytes; otherwise each image of about 10 KiB is a system call
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

OUR_FILES = (INDEX_NAME, NAMES_NAME, REJECTS_NAME, CONTACT_SHEET_NAME, STATS_NAME, MANIFEST_NAME)
OUR_NAMES = re.compile("|".join([r"shard-\d{6,}\.tar", *map(re.escape, (STAGING_NAME, *OUR_FILES))]))


@contextmanager
def whole_file(path: Path, staging: Path) -> Iterator[BinaryIO]:
    """Write a file atomically: it appears at `path` only after all of it was synced to disk.

    Until then it is in `staging`, a folder on the same file system. Raises DataPrepError where the disk is full or the
    folder cannot be written; nothing is left then.
    """
    temporary = staging / f"{path.name}.tmp-{os.getpid()}"  # the worker of a killed run may still be writing
    try:
        with temporary.open("wb", buffering=WRITE_BUFFER) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        hint = "; make room and run again to go on from here" if error.errno in NO_ROOM else ""
        raise DataPrepError(f"{path}: cannot be written ({error.strerror or error}){hint}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _fsync_folder(folder: Path) -> None:
    """fsync `folder`, so that a rename survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_ours(out: Path) -> None:
    """Raise InputError where `out` holds files that data_prep does not write."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: not a folder; give an empty or new one")
    entries = sorted(entry.name for entry in out.iterdir())
    begun = STAGING_NAME in entries or MANIFEST_NAME in entries
    foreign = [name for name in entries if not (begun and OUR_NAMES.fullmatch(name))]
    if foreign:
        raise InputError(f"{out}: holds {foreign[0]}, which is not ours; give an empty or new folder")


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """Lock `out` for this run, and yield its staging folder; creates both where missing.

    Raises InputError where another run holds the lock, and DataPrepError where it cannot be written.
    """
    staging = out / STAGING_NAME
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = (staging / LOCK_NAME).open("ab")
    except OSError as error:
        raise DataPrepError(f"{out}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{out}: another run is writing it; wait for that one or give another folder") from error
        except OSError as error:
            raise DataPrepError(f"{out}: its file system offers no locks ({error.strerror})") from error
        _remove_abandoned(staging)
        try:
            yield staging
        finally:
            _remove_abandoned(staging)


def _remove_abandoned(staging: Path) -> None:
    """Remove partial files of killed workers, to free disk space."""
    for path in staging.glob("*.tmp-*"):
        with suppress(OSError):
            path.unlink()


def discard_staging(out: Path) -> None:
    """Remove the staging folder of a finished run; failures to remove are ignored."""
    shutil.rmtree(out / STAGING_NAME, ignore_errors=True)
