"""A .zip archive of image files, read in place."""

import lzma
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self
from zipfile import BadZipFile, ZipFile, ZipInfo

from data_prep.errors import InputError, Reject
from data_prep.sources.base import Wanted, fingerprint_of, is_safe
from data_prep.sources.label_files import MAX_BYTES
from data_prep.sources.placed import PlacedSource
from data_prep.sources.reading import check_length, has_changed
from data_prep.sources.selection import select

ENCRYPTED_FLAG = 0x1
UNIX_MODE_SHIFT = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class ZipSource(PlacedSource[int]):
    """The file entries of an archive; the fingerprint covers names, sizes and the archive's own CRCs.

    Places are positions in the archive's directory, since names in a zip may not be unique.
    """

    path: Path
    kind: ClassVar[str] = "zip"

    @classmethod
    def open(cls, folder: Path, names: Sequence[str], wanted: Wanted) -> Self:
        """Read the archive's directory.

        Raises InputError where it is missing or damaged, there are several, or as `select` does.
        """
        path = folder / names[0]
        if len(names) > 1:
            raise InputError(f"{path.parent}: holds {len(names)} zips; give one of them, such as {path}")
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
        places = [at for _, at in listed]
        facts = [[_name(entry), entry.file_size, entry.CRC] for entry in entries]
        beside = chosen.further.placed(places.__getitem__)
        return cls(
            path=path,
            names=[listed[position][0] for position in chosen.positions],
            places=[places[position] for position in chosen.positions],
            labels=labelling.labels,
            classes=labelling.classes,
            fingerprint=fingerprint_of([*(facts[places[n]] for n in (*taken, *chosen.positions)), *wanted.choice]),
            further_fingerprint=beside.fingerprint(facts.__getitem__),
            notice="\n".join(chosen.notices) or None,
            left_out=chosen.left_out,
            beside=beside,
        )

    def _content(self, position: int) -> bytes:
        archive = _archive(self.path)
        entry = archive.infolist()[position]
        if not is_safe(entry.filename):
            raise Reject("unsafe name", "absolute, or with a `..`")
        if stat.S_ISLNK(entry.external_attr >> UNIX_MODE_SHIFT):
            raise Reject("link", "links in archives are not followed")
        if entry.flag_bits & ENCRYPTED_FLAG:
            raise Reject("encrypted")
        check_length(entry.file_size)
        try:
            return archive.read(entry)
        except (BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError, OSError) as error:
            if not isinstance(error, OSError) or error.errno is None:  # bz2 raises OSError without errno
                raise Reject("truncated or corrupt", f"{type(error).__name__}: {error}") from error
            raise has_changed(self.path, str(error.strerror)) from error


def _name(entry: ZipInfo) -> str:
    """The entry's name with `/` as separator, also of Windows' archives; one that leads outside is unchanged."""
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
