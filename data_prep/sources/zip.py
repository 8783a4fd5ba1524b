"""A .zip archive of image files, read in place: nothing is ever unpacked to disk."""

import lzma
import stat
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self
from zipfile import BadZipFile, ZipFile

from data_prep.errors import InputError, Reject
from data_prep.recipe import Mode
from data_prep.sources.base import MAX_FILE_BYTES, fingerprint_of, is_hidden, is_safe, labels_from_folders
from data_prep.sources.label_files import JSON_NAME, MAX_JSON_BYTES, is_labels_json, labels_of_json

ENCRYPTED_FLAG = 0x1
UNIX_MODE_SHIFT = 16


@dataclass(frozen=True)
class ZipSource:
    """The file entries of an archive; the fingerprint covers names, sizes and the archive's own CRCs."""

    path: Path
    names: list[str]
    positions: list[int]  # in the archive's directory, since a zip may hold two entries of one name
    labels: list[int]
    classes: list[str]
    fingerprint: str
    kind: ClassVar[str] = "zip"
    natural_mode: ClassVar[Mode] = "RGB"
    notice: ClassVar[None] = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the archive's directory. Raises InputError where it has none that can be read."""
        path = path.resolve()
        entries = _archive(path).infolist()
        listed = sorted(
            (entry.filename, position)
            for position, entry in enumerate(entries)
            if not entry.is_dir() and not is_hidden(entry.filename)
        )
        data = _labels_json(path)
        if data is not None:
            listed = [(name, position) for name, position in listed if name != JSON_NAME]
        names = [name for name, _ in listed]
        positions = [position for _, position in listed]
        if data is not None:
            classes, labels = labels_of_json(data, names, f"{path}: {JSON_NAME}")
        else:
            classes, labels = labels_from_folders([name if is_safe(name) else "" for name in names])
        chosen = [entry for entry in entries if entry.filename == JSON_NAME] if data is not None else []
        chosen += [entries[position] for position in positions]
        fingerprint = fingerprint_of([entry.filename, entry.file_size, entry.CRC] for entry in chosen)
        return cls(path, names, positions, labels, classes, fingerprint)

    def label(self, i: int) -> int:  # noqa: D102 - see Source
        return self.labels[i]

    def read(self, i: int) -> bytes:  # noqa: D102 - see Source
        archive = _archive(self.path)
        entry = archive.infolist()[self.positions[i]]
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
            if not isinstance(error, OSError) or error.errno is None:  # bz2 has no error of its own
                raise Reject("truncated or corrupt", f"{type(error).__name__}: {error}") from error
            raise InputError(f"{self.path}: {error.strerror}; the source must stay as it is during a run") from error

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        return replace(
            self,
            names=self.names[start:stop],
            positions=self.positions[start:stop],
            labels=self.labels[start:stop],
        )


def _labels_json(path: Path) -> bytes | None:
    """The archive's `dataset.json` where that is a list of labels."""
    archive = _archive(path)
    found = [entry for entry in archive.infolist() if entry.filename == JSON_NAME]
    if len(found) != 1 or found[0].file_size > MAX_JSON_BYTES or found[0].flag_bits & ENCRYPTED_FLAG:
        return None
    try:
        data = archive.read(found[0])
    except (BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError, OSError) as error:
        raise InputError(f"{path}: {JSON_NAME} cannot be read ({error}); fetch the file again") from error
    return data if is_labels_json(data) else None


@lru_cache(maxsize=1)
def _archive(path: Path) -> ZipFile:
    """Open once a process: reading the directory of a large archive takes seconds, and each shard needs it."""
    try:
        return ZipFile(path)
    except (BadZipFile, OSError) as error:
        raise InputError(f"{path}: not a readable zip archive ({error})") from error
