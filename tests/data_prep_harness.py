"""What the tests of data_prep share: small images, running it here or as a process, looking at what it wrote."""

import io
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.format import sha256_of

FINAL = {"index.npy", "names.jsonl", "rejects.jsonl", "contact_sheet.png", "manifest.json"}
PHOTO_OPTIONS = ["--size", "32", "--shard-samples", "5", "--max-reject-fraction", "0.5"]
BIG_OPTIONS = ["--size", "64", "--shard-samples", "5", "--workers", "2"]


def noise(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(pixels_of_noise(height, width, seed))


def pixels_of_noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_of(image: Image.Image, encoding: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, encoding, **options)
    return stream.getvalue()


def npy_of(array: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def packed(path: Path, files: Mapping[str, bytes], *, form: int = tarfile.DEFAULT_FORMAT) -> Path:
    """The files in a folder, a .zip or a .tar, by the suffix of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        return write_tar(path, files.items(), form)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def make_photos(root: Path) -> Path:
    """Ten photos of two classes, and two files that are none: positions 4 and 11 of 12."""
    for label, name in enumerate(["bird", "cat"]):
        (root / name).mkdir()
        for i in range(5):
            noise(40 + i, 52, seed=10 * label + i).save(root / name / f"{i}.png")
    (root / "bird" / "38.jpg").write_text("<html>gone</html>")
    (root / "cat" / "9.png").write_bytes((root / "cat" / "0.png").read_bytes()[:500])
    return root


def make_big(root: Path) -> Path:
    """Enough work to be interrupted: 120 photos that must be decoded and resampled."""
    for i in range(3):
        noise(500, 500, seed=i).save(root / f"000-{i}.jpg", quality=60)
    for i in range(117):
        (root / f"{i + 1:03d}.jpg").hardlink_to(root / f"000-{i % 3}.jpg")
    return root


def data_prep(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "data_prep", *map(str, arguments)]


def failing_run(*arguments: object, **options: object) -> str:
    """The one line of a run that must fail."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False, **options)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


def names_of(folder: Path) -> list[str]:
    """The origin of each sample of a dataset."""
    return [json.loads(line) for line in (folder / "names.jsonl").read_text().splitlines()]


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was said since the last look."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def children_of(pid: int) -> list[int]:
    """The worker processes of a run."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
