"""Sealed folders: sets of files that are complete and unchanged by their hashes, or rejected.

A sealed folder holds its files, `manifest.json` with the name, size and sha256 of each and with content of the
caller's, and `COMPLETE` with the manifest's own sha256. It is written under another name and renamed last, so a folder
under its final name was complete; any defect is later damage.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
COMPLETE_NAME = "COMPLETE"
_MOST_BYTES = 1 << 26  # of a manifest for thousands of ranks; a bound, since a device file has no end
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Name, size and hash of a file, as recorded in a manifest."""

    name: str
    bytes: int
    sha256: str


class DamagedError(Exception):
    """The folder differs from what was sealed; the message has the reason."""


def record_file(path: Path) -> FileRecord:
    """fsync a written file, and record its size and hash as read back."""
    fsync(path)
    with path.open("rb") as stream:
        return FileRecord(name=path.name, bytes=os.fstat(stream.fileno()).st_size, sha256=_sha256(stream))


def seal(staging: Path, final: Path, files: Sequence[FileRecord], content: dict[str, Any]) -> None:
    """Write manifest and completion marker into `staging`, then rename it to `final`; each is synced first."""
    manifest = json.dumps({**content, "files": [asdict(file) for file in files]}, indent=1).encode()
    _write(staging / MANIFEST_NAME, manifest)
    _write(staging / COMPLETE_NAME, hashlib.sha256(manifest).hexdigest().encode())
    fsync(staging)
    staging.rename(final)
    fsync(final.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content, with "files" as a list of FileRecord, each naming a file directly in the folder.

    A manifest is untrusted input: its author could write a matching marker. Raises DamagedError where manifest or
    marker is missing, is no regular file, does not match the other, or is malformed, and OSError where they cannot be
    read: that may be an I/O error, which is no proof of damage.
    """
    manifest = read_file(folder / MANIFEST_NAME)
    marker = read_file(folder / COMPLETE_NAME).decode(errors="replace").strip()
    if hashlib.sha256(manifest).hexdigest() != marker:
        raise DamagedError(f"{COMPLETE_NAME} does not belong to this {MANIFEST_NAME}: one of them was changed")
    try:
        content = json.loads(manifest)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
        raise DamagedError(f"{MANIFEST_NAME}: no JSON that can be read ({error})") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{MANIFEST_NAME}: should be an object, is a {type(content).__name__}")
    content["files"] = _records(content.get("files"))
    return content


def read_file(path: Path) -> bytes:
    """Content of a small file of a sealed folder. Raises DamagedError where it is missing, no regular file or too
    large; OSError as `read_manifest`.
    """
    with _open(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _MOST_BYTES:
            raise DamagedError(f"{path.name} has {size} bytes, more than any that this program writes")
        return stream.read()


def verify_file(folder: Path, record: FileRecord) -> None:
    """Raise DamagedError where the file's bytes differ from those sealed; OSError as `read_manifest`."""
    verify_size(folder, record)
    with _open(folder / record.name) as stream:
        if _sha256(stream) != record.sha256:
            raise DamagedError(f"{record.name} differs from its sha256 in the manifest")


def verify_size(folder: Path, record: FileRecord) -> None:
    """Like `verify_file`, for the size alone: no byte is read."""
    with _open(folder / record.name) as stream:
        size = os.fstat(stream.fileno()).st_size
    if size != record.bytes:
        raise DamagedError(f"{record.name} has {size} bytes, the manifest says {record.bytes}")


def _records(files: Any) -> list[FileRecord]:
    if not isinstance(files, list):
        raise DamagedError(f'{MANIFEST_NAME}: "files" should be a list')
    records: list[FileRecord] = []
    seen = {MANIFEST_NAME, COMPLETE_NAME}
    for number, file in enumerate(files):
        where = f"{MANIFEST_NAME}: files[{number}]"
        if not isinstance(file, dict) or file.keys() != {"name", "bytes", "sha256"}:
            raise DamagedError(f"{where} should have name, bytes and sha256")
        name, size, sha256 = file["name"], file["bytes"], file["sha256"]
        if not isinstance(name, str) or not _is_plain(name):
            raise DamagedError(f"{where}: name {name!r} should be that of a file in this folder")
        if name in seen:
            raise DamagedError(f"{where}: {name!r} is listed twice")
        if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise DamagedError(f"{where}: {name!r} should have a number of bytes and 64 hexadecimal digits of sha256")
        seen.add(name)
        records.append(FileRecord(name=name, bytes=size, sha256=sha256))
    return records


def _is_plain(name: str) -> bool:
    """Whether the name is a plain file name, which cannot refer to another folder."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()


def _open(path: Path) -> BufferedReader:
    """Open a regular file: a link could lead elsewhere, and reading a FIFO or a device may never end."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise DamagedError(f"{path.name} is {_KINDS.get(stat.S_IFMT(mode), 'a special file')}, should be a file")
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{path.name} is missing") from error


def fsync(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    fsync(path)


def _sha256(stream: BufferedReader) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()
