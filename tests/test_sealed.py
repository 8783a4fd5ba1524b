"""What others wrote into a manifest: whatever it says, one reason at once, and nothing outside the folder is read."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.engine.checkpointing import sealed
from trainer.engine.checkpointing.sealed import DamagedError

SHA256 = "0" * 64
DEEP = "[" * 200_000 + "]" * 200_000


def seal_as(folder: Path, manifest: bytes) -> Path:
    """A folder whose marker belongs to its manifest, as anybody can make one."""
    folder.mkdir()
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "COMPLETE").write_text(hashlib.sha256(manifest).hexdigest())
    return folder


def verify(folder: Path) -> None:
    for record in sealed.read_manifest(folder)["files"]:
        sealed.verify_file(folder, record)


def reason(folder: Path) -> str:
    started = time.monotonic()
    with pytest.raises(DamagedError) as fault:
        verify(folder)
    assert time.monotonic() - started < 1
    assert "\n" not in str(fault.value)
    return str(fault.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "manifest.json: should be an object"),
        (b"{}", 'manifest.json: "files" should be a list'),
        (b'{"files": null}', 'manifest.json: "files" should be a list'),
        (b'{"files": [7]}', "manifest.json: files[0] should have name, bytes and sha256"),
        (b'{"files": [{"name": "a"}]}', "manifest.json: files[0] should have name, bytes and sha256"),
        (b'{"files": ', "manifest.json: no JSON"),
        (b"\xff\xfe{}", "manifest.json: no JSON"),
        (DEEP.encode(), "manifest.json: no JSON"),
        (b'{"files": [], "step": ' + b"9" * 5000 + b"}", "manifest.json: no JSON"),
    ],
)
def test_a_manifest_of_any_content_gives_one_reason(tmp_path: Path, content: bytes, said: str) -> None:
    assert reason(seal_as(tmp_path / "step", content)).startswith(said)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../outside"),
        ("name", "/etc/passwd"),
        ("name", "sub/part"),
        ("name", ".."),
        ("name", ""),
        ("name", "a\0b"),
        ("name", "COMPLETE"),
        ("name", None),
        ("bytes", -1),
        ("bytes", True),
        ("bytes", 1.0),
        ("sha256", "xyz"),
        ("sha256", None),
    ],
)
def test_a_record_that_is_none_is_refused_before_a_file_is_touched(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "outside").write_bytes(b"")
    record = {"name": "part", "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()} | {field: value}
    folder = seal_as(tmp_path / "step", json.dumps({"files": [record]}).encode())
    assert reason(folder).startswith("manifest.json: files[0]")


def test_a_file_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    record = {"name": "part", "bytes": 0, "sha256": SHA256}
    folder = seal_as(tmp_path / "step", json.dumps({"files": [record, record]}).encode())
    assert reason(folder) == "manifest.json: files[1]: 'part' is listed twice"


def link_loop(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_a_file(path: Path) -> None:
    other = path.parent.parent / "other"
    other.write_bytes(b"abc")
    path.symlink_to(other)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (os.mkfifo, "is a FIFO"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a symbolic link"),
    "link": (link_to_a_file, "is a symbolic link"),
    "link loop": (link_loop, "is a symbolic link"),
    "folder": (Path.mkdir, "is a folder"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["part", "manifest.json", "COMPLETE"])
def test_what_is_no_file_is_no_part(tmp_path: Path, kind: str, name: str) -> None:
    make, said = NO_FILES[kind]
    record = {"name": "part", "bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    folder = seal_as(tmp_path / "step", json.dumps({"files": [record]}).encode())
    (folder / "part").write_bytes(b"abc")
    assert [sealed.verify_file(folder, each) for each in sealed.read_manifest(folder)["files"]] == [None]
    (folder / name).unlink()
    make(folder / name)
    assert reason(folder) == f"{name} {said}, should be a file"


def test_a_manifest_without_end_is_not_read(tmp_path: Path) -> None:
    folder = seal_as(tmp_path / "step", b"{}")
    with (folder / "manifest.json").open("r+b") as stream:
        stream.truncate(1 << 40)  # takes no room on the disk
    assert reason(folder).startswith("manifest.json has 1099511627776 bytes")


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "step").write_text("no folder")
    assert reason(tmp_path / "step") == "manifest.json is missing"
