"""A .zip archive of image files, read in place."""

import lzma
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import ClassVar, Self
from zipfile import BadZipFile, ZipFile, ZipInfo

from data_prep.errors import InputError, Reject
from data_prep.recipe import Mode
from data_prep.sources.base import MAX_FILE_BYTES, Wanted, fingerprint_of, is_safe
from data_prep.sources.label_files import MAX_BYTES
from data_prep.sources.members import Further
from data_prep.sources.selection import select

ENCRYPTED_FLAG = 0x1
UNIX_MODE_SHIFT = 16


@dataclass(frozen=True)
class ZipSource:
    """The file entries of an archive; the fingerprint covers names, sizes and the archive's own CRCs."""

    path: Path
    names: list[str]
    positions: list[int]  # in the archive's directory, since names in a zip may not be unique
    labels: list[int]
    classes: list[str]
    fingerprint: str
    notice: str | None
    left_out: Mapping[str, int]
    beside: Further[int]  # places: positions in the archive's directory
    kind: ClassVar[str] = "zip"
    natural_mode: ClassVar[Mode] = "RGB"

    @classmethod
    def open(cls, path: Path, wanted: Wanted) -> Self:
        """Read the archive's directory. Raises InputError where it is missing or damaged, or as `select` does."""
        path = path.absolute()
        entries = _archive(path).infolist()
        listed = sorted((_name(entry), at) for at, entry in enumerate(entries) if not _name(entry).endswith("/"))
        chosen = select(
            [name if is_safe(name) else "" for name, _ in listed],
            wanted,
            str(path),
            lambda position: _label_file(path, entries[listed[position][1]]),
        )
        labelling = chosen.labelling
        taken = [] if labelling.file is None else [labelling.file[0]]
        rows = [entries[listed[position][1]] for position in (*taken, *chosen.positions)]
        names = [listed[position][0] for position in chosen.positions]
        positions = [listed[position][1] for position in chosen.positions]
        facts = ([_name(entry), entry.file_size, entry.CRC] for entry in rows)
        fingerprint = fingerprint_of(chain(facts, wanted.choice))
        notice = "\n".join(chosen.notices) or None
        beside = chosen.further.placed(lambda position: listed[position][1])
        labels, classes = labelling.labels, labelling.classes
        return cls(path, names, positions, labels, classes, fingerprint, notice, chosen.left_out, beside)

    @property
    def members(self) -> list[str]:  # noqa: D102 - see Source
        return self.beside.members

    def label(self, i: int) -> int:  # noqa: D102 - see Source
        return self.labels[i]

    def read(self, i: int) -> bytes:  # noqa: D102 - see Source
        return self._content(self.positions[i])

    def further(self, i: int) -> dict[str, bytes]:  # noqa: D102 - see Source
        return self.beside.read(i, self._content)

    def _content(self, position: int) -> bytes:
        archive = _archive(self.path)
        entry = archive.infolist()[position]
        if not is_safe(entry.filename):
            raise Reject("unsafe name", "absolute, or with a `..`")
        if stat.S_ISLNK(entry.external_attr >> UNIX_MODE_SHIFT):
            raise Reject("link", "links in archives are not followed")
        if entry.flag_bits & ENCRYPTED_FLAG:
            raise Reject("encrypted")
        if entry.file_size > MAX_FILE_BYTES:
            raise Reject("file too large", f"{entry.file_size} bytes")
        try:
            return archive.read(entry)
        except (BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError, OSError) as error:
            if not isinstance(error, OSError) or error.errno is None:  # bz2 raises OSError without errno
                raise Reject("truncated or corrupt", f"{type(error).__name__}: {error}") from error
            raise InputError(f"{self.path}: {error.strerror}; the source must stay as it is during a run") from error

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        return replace(
            self,
            names=self.names[start:stop],
            positions=self.positions[start:stop],
            labels=self.labels[start:stop],
            beside=self.beside.part(start, stop),
            notice=None,
        )


def _name(entry: ZipInfo) -> str:
    """The entry's name with `/` as separator, also for archives made on Windows; a name that leads outside is
    unchanged.
    """
    return entry.filename.replace("\\", "/") if is_safe(entry.filename) else entry.filename


def _label_file(path: Path, entry: ZipInfo) -> bytes | None:
    """The content of a label file; None where it is too large or encrypted. Raises InputError where it is damaged."""
    if entry.file_size > MAX_BYTES or entry.flag_bits & ENCRYPTED_FLAG:
        return None
    try:
        return _archive(path).read(entry)
    except (BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError, OSError) as error:
        raise InputError(f"{path}: {entry.filename} cannot be read ({error}); --labels none does without") from error


@lru_cache(maxsize=1)
def _archive(path: Path) -> ZipFile:
    """Opened once per process: reading the directory of a large archive takes seconds, and each shard needs it."""
    try:
        return ZipFile(path)
    except (BadZipFile, OSError) as error:
        raise InputError(f"{path}: not a readable zip archive ({error})") from error
