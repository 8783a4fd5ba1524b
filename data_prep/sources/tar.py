"""Tar archives of image files, including WebDataset's: one `.tar`, or a folder of them. They are read in place."""

import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from data_prep.errors import Reject
from data_prep.recipe import Mode
from data_prep.sources.base import MAX_FILE_BYTES, Wanted, fingerprint_of, is_safe
from data_prep.sources.label_files import MAX_BYTES
from data_prep.sources.rules import parts_of
from data_prep.sources.selection import select
from data_prep.sources.webdataset import Member, crowded, labels_beside, sorted_out
from data_prep.tars import content

MAGIC_AT, MAGIC = 257, b"ustar"


@dataclass(frozen=True)
class TarSource:
    """The images of archives in order; the fingerprint covers names, positions, lengths and labels."""

    archives: list[Path]
    members: list[Member]
    names: list[str]
    labels: list[int]
    classes: list[str]
    fingerprint: str
    notice: str | None
    left_out: Mapping[str, int]
    kind: ClassVar[str] = "tar"
    natural_mode: ClassVar[Mode] = "RGB"

    @classmethod
    def open(cls, paths: Sequence[Path], wanted: Wanted, *, titles: Sequence[str] = ()) -> Self:
        """Read all headers; `titles` are prefixes of member names if there are several archives.

        Raises InputError where an archive is damaged or truncated, or as `select` does.
        """
        paths = [path.absolute() for path in paths]
        titles = titles or [path.name for path in paths]
        archives = [sorted_out(path, number) for number, path in enumerate(paths)]
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
            beside = labels_beside(images, archives, paths)
            labelling = beside if beside.classes else labelling
            notices += beside.notices
        fingerprint = fingerprint_of(
            [name, image.offset, image.length, label] for name, image, label in zip(names, images, labelling.labels)
        )
        left_out = sum((archive.left_out for archive in archives), chosen.left_out)
        notice = "\n".join(notices) or None
        return cls(paths, images, names, labelling.labels, labelling.classes, fingerprint, notice, left_out)

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
        return content(self.archives[member.archive], member.offset, member.length)

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        chosen = slice(start, stop)
        return replace(
            self, members=self.members[chosen], names=self.names[chosen], labels=self.labels[chosen], notice=None
        )


def is_tar(path: Path) -> bool:
    """Whether the file begins with a tar header."""
    with path.open("rb") as stream:
        return stream.read(tarfile.BLOCKSIZE)[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def _label_file(paths: Sequence[Path], member: Member) -> bytes | None:
    if member.kind != "file" or member.length > MAX_BYTES:
        return None
    return content(paths[member.archive], member.offset, member.length)
