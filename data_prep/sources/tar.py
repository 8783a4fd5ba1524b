"""Tar archives of image files, including WebDataset's: one `.tar`, or a folder of them. They are read in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, Self

from data_prep.errors import Reject
from data_prep.sources.base import Wanted, fingerprint_of, is_safe
from data_prep.sources.label_files import MAX_BYTES
from data_prep.sources.placed import PlacedSource
from data_prep.sources.reading import check_length
from data_prep.sources.rules import SIDECAR, parts_of
from data_prep.sources.selection import select
from data_prep.sources.webdataset import ArchivedFile, content, crowded, fields_beside, labels_beside, sorted_out

MAGIC_AT, MAGIC = 257, b"ustar"


@dataclass(frozen=True, kw_only=True, eq=False)
class TarSource(PlacedSource[ArchivedFile]):
    """The images of archives in order; the fingerprint covers names, positions, lengths and labels."""

    archives: list[Path]
    kind: ClassVar[str] = "tar"

    @classmethod
    def open(cls, folder: Path, titles: Sequence[str], wanted: Wanted) -> Self:
        """Read all headers of the archives `titles` in `folder`, which precede members' names if there are several.

        Raises InputError where an archive is damaged or truncated, or as `select` does.
        """
        paths = [(folder / title).absolute() for title in titles]
        archives = [sorted_out(path, number, wanted) for number, path in enumerate(paths)]
        candidates = [file for archive in archives for file in archive.candidates]
        chosen = select(
            ["/".join(parts_of(file.name)) if is_safe(file.name) else "" for file in candidates],
            wanted,
            str(paths[0] if len(paths) == 1 else paths[0].parent),
            lambda position: _label_file(paths, candidates[position]),
        )
        images = [candidates[position] for position in chosen.positions]
        names = [image.name if len(paths) == 1 else f"{titles[image.archive]}/{image.name}" for image in images]
        labelling, notices = chosen.labelling, [*chosen.notices, *crowded(names)]
        left_out = sum((archive.left_out for archive in archives), chosen.left_out)
        beside = chosen.further.placed(candidates.__getitem__)
        if wanted.labels == "auto":
            found = labels_beside(images, archives, paths)
            labelling = found if found.classes else labelling
            notices += found.notices
            beside = fields_beside(images, archives, beside, wanted)
            captions = {entry for entry in beside.columns.get("txt", ()) if isinstance(entry, ArchivedFile)}
            left_out[SIDECAR] -= len(captions)
        rows = (
            [name, image.offset, image.length, label] for name, image, label in zip(names, images, labelling.labels)
        )
        return cls(
            archives=paths,
            names=names,
            places=images,
            labels=labelling.labels,
            classes=labelling.classes,
            fingerprint=fingerprint_of(chain(rows, wanted.choice)),
            further_fingerprint=beside.fingerprint(lambda file: [file.name, file.offset, file.length]),
            notice="\n".join(notices) or None,
            left_out=+left_out,
            beside=beside,
        )

    def _content(self, file: ArchivedFile) -> bytes:
        if not is_safe(file.name):
            raise Reject("unsafe name", "absolute, or with a `..`")
        if file.kind != "file":
            raise Reject(file.kind, "links, devices and sparse files in archives are not read")
        check_length(file.length)
        return content(self.archives[file.archive], file)


def _label_file(paths: Sequence[Path], file: ArchivedFile) -> bytes | None:
    if file.kind != "file" or file.length > MAX_BYTES:
        return None
    return content(paths[file.archive], file)
