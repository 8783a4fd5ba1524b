"""Tar archives of image files, webdataset's among them: one `.tar`, or a folder of them. Nothing is ever unpacked.

Webdataset takes all files with the same name up to its first dot for one sample. Here every image is a sample of its
own, so that `a.1.jpg` and `a.2.jpg` are two; the other files of a webdataset sample (`.cls`, `.json`, `.txt`) are not
images and give at most its label.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import ClassVar, Self

from data_prep.errors import InputError, Reject
from data_prep.recipe import Mode
from data_prep.sources.base import (
    MAX_FILE_BYTES,
    classes_of_values,
    fingerprint_of,
    has_image_suffix,
    is_hidden,
    is_safe,
    labels_from_folders,
)
from data_prep.tar_headers import Kind
from data_prep.tars import entries

MAX_LABEL_BYTES = 1024**2
MAGIC_AT, MAGIC = 257, b"ustar"
CACHED_ARCHIVES = 8


@dataclass(frozen=True)
class Member:
    """A file in archive number `archive`: `length` bytes from `offset` on."""

    name: str
    archive: int
    offset: int
    length: int
    kind: Kind


@dataclass(frozen=True)
class TarSource:
    """The images of archives in their order; the fingerprint covers names, places, lengths and labels."""

    archives: list[Path]
    members: list[Member]
    names: list[str]
    labels: list[int]
    classes: list[str]
    fingerprint: str
    notice: str | None
    kind: ClassVar[str] = "tar"
    natural_mode: ClassVar[Mode] = "RGB"

    @classmethod
    def open(cls, archives: Sequence[Path]) -> Self:
        """Walk all headers. Raises InputError where an archive is damaged or cut."""
        archives = [path.resolve() for path in archives]
        images: list[Member] = []
        values: list[int | str | None] = []
        crowded: Counter[str] = Counter()
        for number, path in enumerate(archives):
            found, fields = _sort_out(_members(path, number))
            images += found
            values += _labels(path, found, fields)
            crowded.update(_key(_name(archives, member)) for member in found)
        classes, labels = classes_of_values(values)
        if not classes:
            classes, labels = labels_from_folders([image.name if is_safe(image.name) else "" for image in images])
        names = [_name(archives, member) for member in images]
        fingerprint = fingerprint_of(
            [name, member.offset, member.length, label] for name, member, label in zip(names, images, labels)
        )
        return cls(archives, images, names, labels, classes, fingerprint, _notice(crowded))

    def label(self, i: int) -> int:  # noqa: D102 - see Source
        return self.labels[i]

    def read(self, i: int) -> bytes:  # noqa: D102 - see Source
        member = self.members[i]
        if not is_safe(member.name):
            raise Reject("unsafe name", "absolute, or with a `..`")
        if member.kind != "file":
            raise Reject(member.kind, "links, devices and sparse files in archives are not read")
        if member.length > MAX_FILE_BYTES:
            raise Reject("file too large", f"{member.length} bytes")
        return _read(self.archives[member.archive], member)

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        chosen = slice(start, stop)
        return replace(
            self, members=self.members[chosen], names=self.names[chosen], labels=self.labels[chosen], notice=None
        )


def is_tar(path: Path) -> bool:
    """Whether the file begins with a tar header."""
    with path.open("rb") as stream:
        return stream.read(tarfile.BLOCKSIZE)[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def _members(path: Path, archive: int) -> Iterator[Member]:
    for entry in entries(path):
        if not is_hidden(entry.name) and entry.kind != "folder":
            yield Member(entry.name, archive, entry.offset, entry.length, entry.kind)


def _sort_out(members: Iterable[Member]) -> tuple[list[Member], dict[str, Member]]:
    """The candidates, and by name the files that merely go with one: those that share an image's webdataset key."""
    found = list(members)
    keys = {_key(member.name) for member in found if has_image_suffix(member.name)}
    images: list[Member] = []
    fields: dict[str, Member] = {}
    for member in found:
        if _is_field(member.name) and _key(member.name) in keys:
            fields[member.name] = member
        else:
            images.append(member)
    return images, fields


def _is_field(name: str) -> bool:
    """Whether a name has an extension, but no image's."""
    return "." in name.rpartition("/")[2] and not has_image_suffix(name)


def _key(name: str) -> str:
    """Webdataset's key of a name: up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _labels(path: Path, images: list[Member], fields: dict[str, Member]) -> Iterator[int | str | None]:
    """Each image's `.cls`, or `label` in its `.json`: `a.1.cls` goes before `a.cls` for `a.1.jpg`."""
    for image in images:
        stems = dict.fromkeys([str(PurePosixPath(image.name).with_suffix("")), _key(image.name)])
        files = [fields[stem + suffix] for stem in stems for suffix in (".cls", ".json") if stem + suffix in fields]
        yield _label(path, files[0]) if files and has_image_suffix(image.name) else None


def _label(path: Path, member: Member) -> int | str | None:
    """Raises InputError where a `.cls` holds no number or a `.json` is none."""
    if member.kind != "file" or member.length > MAX_LABEL_BYTES:
        return None
    text = _read(path, member)
    try:
        value = int(text) if member.name.endswith(".cls") else _label_of_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {member.name} holds no label ({error})") from error
    return value


def _label_of_json(value: object) -> int | str | None:
    label = value.get("label") if isinstance(value, dict) else None
    return label if isinstance(label, int | str) and not isinstance(label, bool) else None


def _name(archives: list[Path], member: Member) -> str:
    """The member's own name, after its archive's where there are several."""
    return member.name if len(archives) == 1 else f"{archives[member.archive].name}/{member.name}"


def _notice(crowded: Counter[str]) -> str | None:
    """Said because webdataset itself would make fewer samples of these files."""
    keys = [key for key, images in crowded.items() if images > 1]
    if not keys:
        return None
    return (
        f"{len(keys)} webdataset keys hold several images ({keys[0]!r} holds {crowded[keys[0]]}); "
        "each image becomes a sample of its own"
    )


def _read(path: Path, member: Member) -> bytes:
    try:
        data = os.pread(_opened(path).fileno(), member.length, member.offset)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; the source must stay as it is during a run") from error
    if len(data) != member.length:
        raise InputError(f"{path}: has become shorter; the source must stay as it is during a run")
    return data


@lru_cache(maxsize=CACHED_ARCHIVES)
def _opened(path: Path) -> FileIO:
    """Open once a process; the file closes when the cache lets go of it."""
    return FileIO(path)
