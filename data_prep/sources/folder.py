"""A folder of image files, searched to its depths."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from data_prep.errors import InputError, Reject
from data_prep.recipe import Mode
from data_prep.sources.base import MAX_FILE_BYTES, fingerprint_of, is_hidden, labels_from_folders
from data_prep.sources.label_files import JSON_NAME, MAX_JSON_BYTES, is_labels_json, labels_of_json


@dataclass(frozen=True)
class FolderSource:
    """Files below `root`, named by their path relative to it with `/` between the parts.

    The fingerprint covers names and sizes: a file replaced by another of the same size goes unnoticed, but a copy of
    the folder is the same source.
    """

    root: Path
    names: list[str]
    labels: list[int]
    classes: list[str]
    fingerprint: str
    kind: ClassVar[str] = "folder"
    natural_mode: ClassVar[Mode] = "RGB"
    notice: ClassVar[None] = None

    @classmethod
    def open(cls, root: Path) -> Self:
        """List `root`. Raises InputError where it or a folder in it cannot be listed."""
        root = root.resolve()
        names = sorted(file_names(root))
        rows: list[list[object]] = [[name, _size(root / name)] for name in names]
        listed = root / JSON_NAME
        if JSON_NAME in names and _size(listed) <= MAX_JSON_BYTES and is_labels_json(data := listed.read_bytes()):
            names.remove(JSON_NAME)
            classes, labels = labels_of_json(data, names, str(listed))
            rows.append([JSON_NAME, hashlib.sha256(data).hexdigest()])
        else:
            classes, labels = labels_from_folders(names)
        return cls(root, names, labels, classes, fingerprint_of(rows))

    def label(self, i: int) -> int:  # noqa: D102 - see Source
        return self.labels[i]

    def read(self, i: int) -> bytes:  # noqa: D102 - see Source
        path = self.root / self.names[i]
        if path.is_symlink():
            path = self._inside(path)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise Reject("file too large", f"{path.stat().st_size} bytes")
            return path.read_bytes()
        except PermissionError as error:
            raise Reject("unreadable", str(error.strerror)) from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; the source must stay as it is during a run") from error

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        return replace(self, names=self.names[start:stop], labels=self.labels[start:stop])

    def _inside(self, link: Path) -> Path:
        """The file a link points to, which must be one of this folder's."""
        target = Path(os.path.realpath(link))
        if not target.is_relative_to(self.root):
            raise Reject("link out of the folder", str(target))
        if not target.is_file():
            raise Reject("broken link", str(target))
        return target


def file_names(root: Path) -> Iterator[str]:
    """Regular files and links to files below `root`, from the top down, hidden ones left out.

    Linked folders are not entered: they may form a ring. Raises InputError where a folder cannot be listed.
    """
    for folder, subfolders, files in os.walk(root, onerror=_cannot_list):
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        for name in files:
            path = Path(folder, name)
            if not is_hidden(name) and (path.is_symlink() or path.is_file()):
                yield path.relative_to(root).as_posix()


def _cannot_list(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")


def _size(path: Path) -> int:
    """In bytes, or -1 for a broken link."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
