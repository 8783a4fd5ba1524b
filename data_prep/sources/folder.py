"""A folder of image files, searched recursively."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from data_prep.errors import Reject
from data_prep.sources.base import Wanted, fingerprint_of
from data_prep.sources.label_files import MAX_BYTES
from data_prep.sources.placed import PlacedSource
from data_prep.sources.reading import check_length, has_changed
from data_prep.sources.selection import select
from data_prep.sources.walk import Listing


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderSource(PlacedSource[str]):
    """Files below `root`, named by their path relative to it with `/` between the parts.

    The fingerprint covers names and sizes, and the content of a label file. An image replaced by one of the same size
    is not noticed; a copy of the folder has the same fingerprint.
    """

    root: Path
    kind: ClassVar[str] = "folder"

    @classmethod
    def open(cls, listing: Listing, wanted: Wanted, *, shards: frozenset[str] = frozenset()) -> Self:
        """Select images from `listing`; `shards` are folders that are no classes.

        Raises InputError as `select` does.
        """
        root, listed = listing.root.absolute(), listing.names

        def content(position: int) -> bytes | None:
            path = root / listed[position]
            return path.read_bytes() if 0 <= _size(path) <= MAX_BYTES else None

        chosen = select(listed, wanted, str(root), content, shards=shards)
        names = [listed[position] for position in chosen.positions]
        labelling = chosen.labelling
        extra = [] if labelling.file is None else [listed[labelling.file[0]]]
        rows: list[list[object]] = [[name, _size(root / name)] for name in sorted([*names, *extra])]
        if labelling.file is not None:
            rows.append([*extra, labelling.file[1]])
        rows += wanted.choice
        beside = chosen.further.placed(lambda position: listed[position])
        return cls(
            root=root,
            names=names,
            places=names,
            labels=labelling.labels,
            classes=labelling.classes,
            fingerprint=fingerprint_of(rows),
            further_fingerprint=beside.fingerprint(lambda name: [name, _size(root / name)]),
            notice="\n".join([*listing.notices, *chosen.notices]) or None,
            left_out=listing.left_out + chosen.left_out,
            beside=beside,
        )

    def _content(self, name: str) -> bytes:
        path = self.root / name
        if path.is_symlink() and not path.is_file():
            raise Reject("broken link", os.path.realpath(path))
        try:
            check_length(path.stat().st_size)
            return path.read_bytes()
        except PermissionError as error:
            raise Reject("unreadable", str(error.strerror)) from error
        except OSError as error:
            raise has_changed(path, str(error.strerror)) from error


def _size(path: Path) -> int:
    """Size in bytes, or -1 for a broken link."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
