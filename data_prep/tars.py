"""Tar archives read so that damage is an error.

`tarfile` and webdataset take a header that they cannot read for the end of the archive, and a shard that has lost half
of its samples for a shorter shard.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import InputError

CHUNK = 1024**2


def walk(path: Path) -> Iterator[tarfile.TarInfo]:
    """The archive's headers in their order, up to its end mark.

    Raises InputError where the file cannot be read, is cut, or goes on behind what looks like its end.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            yield from _headers(tar)
            end = tar.offset
    except tarfile.TarError as error:
        raise InputError(f"{path}: not a whole tar archive ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    _check_end(path, end)


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or a walk would hold a million headers
        yield member


def _check_end(path: Path, end: int) -> None:
    """Raise InputError unless nothing but zeros, and at least a block of them, lies behind `end`."""
    size = path.stat().st_size
    if size - end < tarfile.BLOCKSIZE:
        raise InputError(f"{path}: cut at byte {size}, without the mark of a tar's end; restore the file")
    with path.open("rb") as stream:
        stream.seek(end)
        while chunk := stream.read(CHUNK):
            if any(chunk):
                raise InputError(f"{path}: the header at byte {end} is damaged; restore the file")
