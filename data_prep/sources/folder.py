"""A folder of image files, searched recursively."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from data_prep.errors import InputError, Reject
from data_prep.recipe import Mode
from data_prep.sources.base import MAX_FILE_BYTES, Wanted, fingerprint_of
from data_prep.sources.label_files import MAX_BYTES
from data_prep.sources.members import Further
from data_prep.sources.selection import select
from data_prep.sources.walk import Listing


@dataclass(frozen=True)
class FolderSource:
    """Files below `root`, named by their path relative to it with `/` between the parts.

    The fingerprint covers names and sizes, and the content of a label file. An image replaced by one of the same size
    is not noticed; a copy of the folder has the same fingerprint.
    """

    root: Path
    names: list[str]
    labels: list[int]
    classes: list[str]
    fingerprint: str
    notice: str | None
    left_out: Mapping[str, int]
    beside: Further[str]
    kind: ClassVar[str] = "folder"
    natural_mode: ClassVar[Mode] = "RGB"

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
        notice = "\n".join([*listing.notices, *chosen.notices]) or None
        left_out = listing.left_out + chosen.left_out
        beside = chosen.further.placed(lambda position: listed[position])
        return cls(root, names, labelling.labels, labelling.classes, fingerprint_of(rows), notice, left_out, beside)

    @property
    def members(self) -> list[str]:  # noqa: D102 - see Source
        return self.beside.members

    def label(self, i: int) -> int:  # noqa: D102 - see Source
        return self.labels[i]

    def read(self, i: int) -> bytes:  # noqa: D102 - see Source
        return self._content(self.names[i])

    def further(self, i: int) -> dict[str, bytes]:  # noqa: D102 - see Source
        return self.beside.read(i, self._content)

    def _content(self, name: str) -> bytes:
        path = self.root / name
        if path.is_symlink() and not path.is_file():
            raise Reject("broken link", os.path.realpath(path))
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise Reject("file too large", f"{path.stat().st_size} bytes")
            return path.read_bytes()
        except PermissionError as error:
            raise Reject("unreadable", str(error.strerror)) from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; the source must stay as it is during a run") from error

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        names, labels = self.names[start:stop], self.labels[start:stop]
        return replace(self, names=names, labels=labels, beside=self.beside.part(start, stop), notice=None)


def _size(path: Path) -> int:
    """Size in bytes, or -1 for a broken link."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
