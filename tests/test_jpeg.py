"""Which JPEGs are whole: libjpeg's own word for it, asked of djpeg's library through simplejpeg, and holes of zeros."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_prep import jpeg as jpeg_module
from data_prep.errors import InputError, Reject
from data_prep.jpeg import hole_of_zeros, jpeg_fault
from data_prep.recipe import Recipe
from data_prep.write.convert import convert
from data_prep.write.writer import write_shard
from tests.data_prep_harness import bytes_of, data_prep, file_of, pixels_of_noise
from trainer.data.decode import decode
from trainer.errors import SampleError

SIDE = 96


def photo(**options: Any) -> bytes:
    small = Image.fromarray(pixels_of_noise(12, 12, seed=3))
    return file_of(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), "JPEG", quality=90, **options)


BASELINE, PROGRESSIVE, RESTARTS = photo(), photo(progressive=True), photo(restart_marker_blocks=3)
GREY = file_of(Image.open(io.BytesIO(BASELINE)).convert("L"), "JPEG")
CMYK = file_of(Image.open(io.BytesIO(BASELINE)).convert("CMYK"), "JPEG")
KINDS = [BASELINE, PROGRESSIVE, RESTARTS, GREY, CMYK, photo(optimize=True), photo(subsampling="4:4:4")]


def restart_markers(data: bytes) -> list[int]:
    return [at for at in range(len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]


def without_intervals(first: int, last: int) -> bytes:
    marks = restart_markers(RESTARTS)
    return RESTARTS[: marks[first]] + RESTARTS[marks[last] :]


def damaged(data: bytes, kind: int, rng: np.random.Generator) -> bytes:
    """Cut and ended, a part missing, a part put in, a bit turned, or cut."""
    at = int(rng.integers(data.index(b"\xff\xda") + 14, len(data) - 10))
    length = int(rng.integers(1, 600))
    return [
        data[:at] + b"\xff\xd9",
        data[:at] + data[at + length :],
        data[:at] + rng.bytes(length) + data[at:],
        data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :],
        data[:at],
    ][kind]


@pytest.mark.parametrize("data", KINDS, ids=["baseline", "progressive", "restarts", "grey", "cmyk", "optimized", "444"])
def test_every_damage_that_libjpeg_notices_is_a_fault_and_no_other(data: bytes) -> None:
    assert jpeg_fault(data) is None
    rng = np.random.default_rng(0)
    colours = "CMYK" if data is CMYK else "RGB"
    told = 0
    for trial in range(60):
        case = damaged(data, trial % 5, rng)
        try:
            simplejpeg.decode_jpeg(case, colours)
            expected = None
        except ValueError as error:
            expected = str(error)
        assert (jpeg_fault(case) is None) == (expected is None), (trial, expected)
        told += expected is not None
    assert told > 30


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("data", [BASELINE, PROGRESSIVE], ids=["baseline", "progressive"])
def test_a_jpeg_that_was_cut_and_ended_is_refused_by_preparation_and_stream(data: bytes, cut: float) -> None:
    start = data.index(b"\xff\xda") + 14
    ended = data[: start + int(cut * (len(data) - start))] + b"\xff\xd9"
    for transform in ("ddpm", "source"):
        with pytest.raises(Reject, match="truncated or corrupt") as caught:
            convert(ended, Recipe(image_size=SIDE, transform=transform))
        assert "premature end" in caught.value.detail
    with pytest.raises(SampleError, match="premature end"):
        decode(ended, SIDE, "RGB", crop=True)


@pytest.mark.parametrize("missing", [(3, 4), (2, 10)], ids=["one", "eight, after which the count is right again"])
def test_a_missing_restart_interval_is_a_fault(missing: tuple[int, int]) -> None:
    fault = jpeg_fault(without_intervals(*missing))
    assert fault is not None
    assert "instead of RST" in fault


def test_a_warning_beside_the_pixels_hides_none_of_them() -> None:
    """libjpeg tells only the first."""
    odd = BASELINE.replace(b"\x03\x11\x00?\x00", b"\x03\x11\x00\x00\x00")
    stray = odd[:20] + b"\0\0\0" + odd[20:]
    assert jpeg_fault(stray) is None
    assert jpeg_fault(stray[:-300] + b"\xff\xd9") == "Corrupt JPEG data: premature end of data segment"


@pytest.mark.parametrize("data", [BASELINE, GREY, CMYK], ids=["colour", "grey", "cmyk"])
def test_a_hole_of_zeros_is_a_fault_even_where_libjpeg_finds_none(data: bytes) -> None:
    middle = data.index(b"\xff\xda") + 200
    assert hole_of_zeros(data[:middle] + bytes(512) + data[middle + 512 :]) is not None
    assert hole_of_zeros(data) is None


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_flat_area_is_no_hole(mode: str, options: dict[str, Any]) -> None:
    """Its blocks may well be zeros, where the Huffman tables were made for it."""
    image = Image.new(mode, (1200, 900), 7)
    image.paste(Image.open(io.BytesIO(BASELINE)).convert(mode), (300, 300))
    encoded = file_of(image, "JPEG", **options)
    assert (bytes(256) in encoded) == bool(options)
    assert jpeg_fault(encoded) is None


def test_zeros_in_the_metadata_are_no_hole() -> None:
    padding = b"\xff\xe1" + (4002).to_bytes(2, "big") + bytes(4000)
    assert jpeg_fault(BASELINE[:2] + padding + BASELINE[2:]) is None


def test_nothing_that_begins_like_a_jpeg_leads_astray() -> None:
    rng = np.random.default_rng(1)
    for length in (0, 1, 5, 600):
        assert jpeg_fault(b"\xff\xd8\xff" + bytes(length)) is not None
        assert jpeg_fault(b"\xff\xd8\xff" + rng.bytes(length)) is not None
    assert jpeg_fault(b"\xff\xd8\xff\xda\0\0" + bytes(600)) is not None
    assert jpeg_fault(b"\xff\xd8" + b"\xff\xc4\0\0" * 300) is not None


def test_preparation_without_simplejpeg_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jpeg_module, "simplejpeg", None)
    with pytest.raises(InputError, match="pip install simplejpeg"):
        convert(BASELINE, Recipe(image_size=SIDE))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jpg").write_bytes(BASELINE)
    assert data_prep(tmp_path / "source", tmp_path / "out", "--size", SIDE) == 2
    assert "pip install simplejpeg" in capsys.readouterr().err


def test_verify_tells_of_what_an_older_version_has_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "whole.jpg").write_bytes(BASELINE)
    (source / "ended.jpg").write_bytes(BASELINE[:-400] + b"\xff\xd9")
    with monkeypatch.context() as older:
        older.setattr("data_prep.write.images.jpeg_fault", lambda _: None)
        older.setattr("data_prep.inspection.dataset.jpeg_fault", lambda _: None)
        older.setattr(
            "data_prep.write.build.write_shards", lambda plans, *rest: (write_shard(p, *rest[:3]) for p in plans)
        )
        assert data_prep(source, out, "--size", SIDE, "--transform", "source") == 0
    capsys.readouterr()
    before = bytes_of(out)
    assert data_prep("verify", out, "--decode", "all") == 2
    assert "premature end of data segment" in capsys.readouterr().err
    assert bytes_of(out) == before
