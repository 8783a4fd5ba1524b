"""LSUN's export: an LMDB whose values are encoded images, scenes and objects alike.

Keys are 40 hexadecimal digits in ASCII, values are JPEG or WebP whatever the documentation says; neither is relied on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from data_prep.errors import InputError, Reject
from data_prep.format import UNLABELLED
from data_prep.recipe import Mode
from data_prep.sources.base import MAX_FILE_BYTES, fingerprint_of, needed_module

DATA_NAME = "data.mdb"
LOSSLESS = "surrogateescape"  # so that any key has a name, and any name gives back its key


@dataclass(frozen=True)
class LmdbSource:
    """The values of a database, named by their keys in their order; the fingerprint covers keys and lengths."""

    root: Path
    names: list[str]
    fingerprint: str
    kind: ClassVar[str] = "lmdb"
    classes: ClassVar[list[str]] = []
    natural_mode: ClassVar[Mode] = "RGB"
    notice: ClassVar[None] = None
    left_out: ClassVar[dict[str, int]] = {}

    @classmethod
    def open(cls, root: Path) -> Self:
        """List the keys (550,000 a second). Raises InputError where the database cannot be read, or lmdb is missing."""
        root = root.resolve()
        with _reading(root) as transaction:
            rows = [(bytes(key).decode(errors=LOSSLESS), len(value)) for key, value in transaction.cursor()]
        return cls(root, [name for name, _ in rows], fingerprint_of(rows))

    def label(self, i: int) -> int:  # noqa: ARG002, D102 - see Source
        return UNLABELLED

    def read(self, i: int) -> bytes:  # noqa: D102 - see Source
        with _reading(self.root) as transaction:
            value = transaction.get(self.names[i].encode(errors=LOSSLESS))
            if value is None:
                raise InputError(
                    f"{self.root}: has lost key {self.names[i]}; the source must stay as it is during a run"
                )
            if len(value) > MAX_FILE_BYTES:
                raise Reject("file too large", f"{len(value)} bytes")
            return bytes(value)

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        return replace(self, names=self.names[start:stop])


@contextmanager
def _reading(root: Path) -> Iterator[Any]:
    """A read transaction, whose values are views of the file. Raises InputError where reading in it fails."""
    lmdb = needed_module("lmdb")
    try:
        yield _transaction(root)
    except lmdb.Error as error:
        raise InputError(f"{root / DATA_NAME}: cannot be read ({error})") from error


@lru_cache(maxsize=1)
def _transaction(root: Path) -> Any:
    """Begun once a process: it costs as much as reading a value, and nobody writes that it could keep from its room."""
    return _environment(root).begin(buffers=True)


def _environment(root: Path) -> Any:
    """The database, opened without touching lock.mdb: the folder may be read-only."""
    lmdb, path = needed_module("lmdb"), root / DATA_NAME
    try:
        environment = lmdb.open(str(root), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{path}: not a readable LMDB ({error})") from error
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found = path.stat().st_size
    if found < expected:  # reading behind a memory map's end would kill the process
        raise InputError(f"{path}: {found} bytes of at least {expected}; the download is incomplete, fetch it again")
    return environment
