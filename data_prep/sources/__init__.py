"""Where images come from: a folder, a zip archive, or a set shipped in a package."""

import zipfile
from pathlib import Path

from data_prep.errors import InputError
from data_prep.sources.base import Source
from data_prep.sources.embedded import Mnist5kSource
from data_prep.sources.folder import FolderSource
from data_prep.sources.zip import ZipSource

__all__ = ["Source", "open_source"]

EMBEDDED_PREFIX = "embedded:"


def open_source(spec: str) -> Source:
    """Open what the command line calls SRC.

    Raises InputError where it is nothing we read, or holds no file at all.
    """
    source = _open(spec)
    if not source.names:
        raise InputError(f"{spec}: holds no files; give a folder or .zip with images in it")
    return source


def _open(spec: str) -> Source:
    if spec.startswith(EMBEDDED_PREFIX):
        if spec != EMBEDDED_PREFIX + "mnist5k":
            raise InputError(f"{spec}: no such embedded set; there is {EMBEDDED_PREFIX}mnist5k")
        return Mnist5kSource.open()
    path = Path(spec)
    if path.is_dir():
        return FolderSource.open(path)
    if not path.exists():
        raise InputError(f"{spec}: no such file or folder")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{spec}: neither a folder nor a readable .zip archive")
    return ZipSource.open(path)
