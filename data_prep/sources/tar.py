"""Tar archives of image files, including WebDataset's: one `.tar`, or a folder of them. They are read in place."""

import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import ClassVar, Self

from data_prep.errors import Reject
from data_prep.recipe import Mode
from data_prep.sources.base import MAX_FILE_BYTES, Wanted, fingerprint_of, is_safe
from data_prep.sources.label_files import MAX_BYTES
from data_prep.sources.members import Further
from data_prep.sources.rules import SIDECAR, parts_of
from data_prep.sources.selection import select
from data_prep.sources.webdataset import Member, crowded, fields_beside, labels_beside, sorted_out
from data_prep.tars import content

MAGIC_AT, MAGIC = 257, b"ustar"


@dataclass(frozen=True)
class TarSource:
    """The images of archives in order; the fingerprint covers names, positions, lengths and labels."""

    archives: list[Path]
    images: list[Member]
    names: list[str]
    labels: list[int]
    classes: list[str]
    fingerprint: str
    notice: str | None
    left_out: Mapping[str, int]
    beside: Further[Member]
    kind: ClassVar[str] = "tar"
    natural_mode: ClassVar[Mode] = "RGB"

    @classmethod
    def open(cls, paths: Sequence[Path], wanted: Wanted, *, titles: Sequence[str] = ()) -> Self:
        """Read all headers; `titles` are prefixes of member names if there are several archives.

        Raises InputError where an archive is damaged or truncated, or as `select` does.
        """
        paths = [path.absolute() for path in paths]
        titles = titles or [path.name for path in paths]
        archives = [sorted_out(path, number, wanted) for number, path in enumerate(paths)]
        members = [member for archive in archives for member in archive.candidates]
        chosen = select(
            ["/".join(parts_of(member.name)) if is_safe(member.name) else "" for member in members],
            wanted,
            str(paths[0] if len(paths) == 1 else paths[0].parent),
            lambda position: _label_file(paths, members[position]),
        )
        images = [members[position] for position in chosen.positions]
        names = [image.name if len(paths) == 1 else f"{titles[image.archive]}/{image.name}" for image in images]
        labelling, notices = chosen.labelling, [*chosen.notices, *crowded(names)]
        if wanted.labels == "auto":
            found = labels_beside(images, archives, paths)
            labelling = found if found.classes else labelling
            notices += found.notices
        rows = (
            [name, image.offset, image.length, label] for name, image, label in zip(names, images, labelling.labels)
        )
        fingerprint = fingerprint_of(chain(rows, wanted.choice))
        left_out = sum((archive.left_out for archive in archives), chosen.left_out)
        notice = "\n".join(notices) or None
        beside = chosen.further.placed(lambda position: members[position])
        if wanted.labels == "auto":
            beside = fields_beside(images, archives, beside, wanted)
            left_out[SIDECAR] -= len({entry for entry in beside.columns.get("txt", ()) if isinstance(entry, Member)})
        labels, classes = labelling.labels, labelling.classes
        return cls(paths, images, names, labels, classes, fingerprint, notice, +left_out, beside)

    @property
    def members(self) -> list[str]:  # noqa: D102 - see Source
        return self.beside.members

    def label(self, i: int) -> int:  # noqa: D102 - see Source
        return self.labels[i]

    def read(self, i: int) -> bytes:  # noqa: D102 - see Source
        return self._content(self.images[i])

    def further(self, i: int) -> dict[str, bytes]:  # noqa: D102 - see Source
        return self.beside.read(i, self._content)

    def _content(self, member: Member) -> bytes:
        if not is_safe(member.name):
            raise Reject("unsafe name", "absolute, or with a `..`")
        if member.kind != "file":
            raise Reject(member.kind, "links, devices and sparse files in archives are not read")
        if member.length > MAX_FILE_BYTES:
            raise Reject("file too large", f"{member.length} bytes")
        return content(self.archives[member.archive], member.offset, member.length)

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        chosen = slice(start, stop)
        beside = self.beside.part(start, stop)
        images, names, labels = self.images[chosen], self.names[chosen], self.labels[chosen]
        return replace(self, images=images, names=names, labels=labels, beside=beside, notice=None)


def is_tar(path: Path) -> bool:
    """Whether the file begins with a tar header."""
    with path.open("rb") as stream:
        return stream.read(tarfile.BLOCKSIZE)[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def _label_file(paths: Sequence[Path], member: Member) -> bytes | None:
    if member.kind != "file" or member.length > MAX_BYTES:
        return None
    return content(paths[member.archive], member.offset, member.length)
