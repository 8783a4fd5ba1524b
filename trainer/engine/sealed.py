"""Sealed folders: a set of files that is either whole and provably unchanged, or refused.

A sealed folder holds its files, `manifest.json` that records name, size and sha256 of each beside whatever the owner
wants to say, and `COMPLETE`, which holds the manifest's own sha256. It is made under another name and renamed into
place as the last act, so a folder under its final name was finished; whatever is wrong with it was damaged later.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
COMPLETE_NAME = "COMPLETE"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a manifest promises about one file."""

    name: str
    bytes: int
    sha256: str


class DamagedError(Exception):
    """The folder is not what was sealed; the message is the reason."""


def record_file(path: Path) -> FileRecord:
    """Bring a written file to the disk and record it as it is there."""
    fsync(path)
    return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=_sha256(path))


def seal(staging: Path, final: Path, files: Sequence[FileRecord], content: dict[str, Any]) -> None:
    """Write manifest and completion marker into `staging`, then rename it to `final`; each step is on disk first."""
    manifest = json.dumps({**content, "files": [asdict(file) for file in files]}, indent=1).encode()
    _write(staging / MANIFEST_NAME, manifest)
    _write(staging / COMPLETE_NAME, hashlib.sha256(manifest).hexdigest().encode())
    fsync(staging)
    staging.rename(final)
    fsync(final.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content with "files" as a list of FileRecord.

    Raises DamagedError where the manifest or the marker is missing, or the one is not of the other, and OSError where
    they cannot be read: that may be the file system's fault, and no reason to give a checkpoint up.
    """
    try:
        manifest = (folder / MANIFEST_NAME).read_bytes()
        marker = (folder / COMPLETE_NAME).read_bytes().decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{Path(error.filename).name} is missing") from error
    if hashlib.sha256(manifest).hexdigest() != marker:
        raise DamagedError(f"{COMPLETE_NAME} does not belong to this {MANIFEST_NAME}: one of them was changed")
    content = json.loads(manifest)
    content["files"] = [FileRecord(**file) for file in content["files"]]
    return content


def verify_file(folder: Path, record: FileRecord) -> None:
    """Raise DamagedError where the file is not, byte for byte, the one that was sealed; OSError as `read_manifest`."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise DamagedError(f"{record.name} has {size} bytes, the manifest says {record.bytes}")
        if _sha256(path) != record.sha256:
            raise DamagedError(f"{record.name} differs from its sha256 in the manifest")
    except FileNotFoundError as error:
        raise DamagedError(f"{record.name} is missing") from error


def fsync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    fsync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
