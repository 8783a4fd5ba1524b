"""LSUN's export: an LMDB whose values are encoded images, for both scenes and objects.

Keys are 40 hexadecimal digits in ASCII, and values JPEG or WebP, in contrast to the documentation; the reader relies on
neither.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

from data_prep.errors import InputError
from data_prep.format import UNLABELLED
from data_prep.sources.base import fingerprint_of, needed_module
from data_prep.sources.placed import PlacedSource
from data_prep.sources.reading import check_length, has_changed

DATA_NAME = "data.mdb"
STDERR = 2
LOSSLESS = "surrogateescape"  # maps keys to names and back without loss


@dataclass(frozen=True, kw_only=True, eq=False)
class LmdbSource(PlacedSource[str]):
    """The values of a database, named by their keys in their order; the fingerprint covers keys and lengths."""

    root: Path
    kind: ClassVar[str] = "lmdb"

    @classmethod
    def open(cls, root: Path) -> Self:
        """List the keys (550,000 a second). Raises InputError where the database cannot be read, or lmdb is missing.

        This runs in a separate process, since LMDB aborts the process for a damaged or missing page. Afterwards every
        page of the tree was read once, and only values remain to be read, whose content cannot cause that.
        """
        root = root.resolve()
        needed_module("lmdb")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=_keep_silent) as pool:
            try:
                rows = pool.submit(_rows, root).result()
            except BrokenProcessPool as error:
                raise InputError(
                    f"{root / DATA_NAME}: damaged (reading its keys ended the process that did it); fetch it again"
                ) from error
        names, labels = [name for name, _ in rows], [UNLABELLED] * len(rows)
        return cls(root=root, names=names, places=names, labels=labels, classes=[], fingerprint=fingerprint_of(rows))

    def _content(self, name: str) -> bytes:
        with _reading(self.root) as transaction:
            value = transaction.get(name.encode(errors=LOSSLESS))
            if value is None:
                raise has_changed(self.root, f"has lost key {name}")
            check_length(len(value))
            return bytes(value)


def _keep_silent() -> None:
    """Discard the child's output, LMDB's messages included: the parent reports the error in one line."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)


def _rows(root: Path) -> list[tuple[str, int]]:
    """Name and length of each value. Raises InputError where there are more or fewer than the database says."""
    with _reading(root) as transaction:
        expected = transaction.stat()["entries"]
        found = islice(transaction.cursor(), expected + 1)  # bounded, since damaged pages may form a cycle
        rows = [(bytes(key).decode(errors=LOSSLESS), len(value)) for key, value in found]
    if len(rows) != expected:
        count = "more than" if len(rows) > expected else f"{len(rows)} of"
        raise InputError(f"{root / DATA_NAME}: damaged ({count} {expected} keys can be reached); fetch it again")
    return rows


@contextmanager
def _reading(root: Path) -> Iterator[Any]:
    """A read transaction, whose values are views of the file. Raises InputError where reading fails."""
    lmdb = needed_module("lmdb")
    try:
        yield _transaction(root)
    except lmdb.Error as error:
        raise InputError(f"{root / DATA_NAME}: cannot be read ({error})") from error


@lru_cache(maxsize=1)
def _transaction(root: Path) -> Any:
    """Opened once per process, since it costs as much as reading a value; nobody writes to the database.

    Without lock.mdb, since the folder may be read-only.
    """
    lmdb, path = needed_module("lmdb"), root / DATA_NAME
    try:
        environment = lmdb.open(str(root), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{path}: not a readable LMDB ({error})") from error
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found = path.stat().st_size
    if found < expected:  # reading beyond the end of a memory map would kill the process
        raise InputError(f"{path}: {found} bytes of at least {expected}; the download is incomplete, fetch it again")
    return environment.begin(buffers=True)
