"""Decoding: fast decoders change no pixel, and what is damaged is never taken for an image."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.harness import load_config
from trainer.data import decode as decode_module
from trainer.data.decode import decode, jpeg_signature
from trainer.data.training_data import open_training_data
from trainer.errors import DataError, SampleError


def jpeg(colour: str, size: tuple[int, int] = (40, 24), **options: Any) -> bytes:
    rng = np.random.default_rng(5)
    channels = {"RGB": 3, "L": 1, "CMYK": 4}[colour]
    small = rng.integers(0, 256, (6, 10, channels), dtype=np.uint8).squeeze()
    image = Image.fromarray(small, colour).resize(size, Image.Resampling.BICUBIC)
    return saved(image, "JPEG", **options)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def webp(mode: str = "RGB", size: tuple[int, int] = (40, 24), **options: Any) -> bytes:
    image = Image.open(io.BytesIO(jpeg("RGB", size))).convert(mode)
    return saved(image, "WEBP", **({"lossless": True, "method": 0, "quality": 0} | options))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_decoder_makes_pillows_pixels(mode: str, subsampling: str, progressive: bool) -> None:
    """What the signature is for, should another version differ."""
    for quality, size in ((30, (40, 24)), (75, (24, 24)), (95, (24, 33))):
        encoded = jpeg(mode, size, quality=quality, subsampling=subsampling, progressive=progressive)
        fast, slow = (np.empty((24, 24, 3 if mode == "RGB" else 1), dtype=np.uint8) for _ in range(2))
        assert decode_module._decode_jpeg(fast, encoded, mode, crop=True)
        decode_module._decode_by_pillow(slow, encoded, mode, crop=True)
        assert (fast == slow).all()


@pytest.mark.parametrize("size", [(24, 24), (40, 24), (24, 33)])
def test_the_fast_decoder_makes_pillows_pixels_of_lossless_webps(size: tuple[int, int]) -> None:
    for effort in (0, 6):
        encoded = webp("RGB", size, method=effort)
        fast, slow = (np.empty((24, 24, 3), dtype=np.uint8) for _ in range(2))
        assert decode_module._decode_webp(fast, encoded, "RGB", crop=True)
        decode_module._decode_by_pillow(slow, encoded, "RGB", crop=True)
        assert (fast == slow).all()


TRANSPARENT = saved(Image.new("RGBA", (24, 24), (1, 2, 3, 4)), "WEBP", lossless=True)


def animated_webp() -> bytes:
    first, second = (Image.new("RGB", (24, 24), colour) for colour in ("red", "blue"))
    return saved(first, "WEBP", lossless=True, save_all=True, append_images=[second])


@pytest.mark.parametrize(
    ("encoded", "mode"),
    [
        (webp(lossless=False), "RGB"),
        (TRANSPARENT, "RGB"),
        (webp(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"), "RGB"),
        (animated_webp(), "RGB"),
        (webp(), "L"),
        (webp()[:-40], "RGB"),
        (jpeg("RGB"), "RGB"),
    ],
    ids=["lossy", "transparent", "with metadata", "animated", "grey wanted", "cut", "no webp"],
)
def test_what_is_no_plain_lossless_webp_is_pillows_case(encoded: bytes, mode: str) -> None:
    out = np.empty((24, 24, {"RGB": 3, "L": 1}[mode]), dtype=np.uint8)
    assert not decode_module._decode_webp(out, encoded, mode, crop=True)


def test_without_the_fast_decoder_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = decode(webp(), 24, "RGB", crop=True)
    monkeypatch.setattr(decode_module, "webp", None)
    assert (decode(webp(), 24, "RGB", crop=True) == fast).all()


def test_the_signature_is_that_of_every_run_so_far() -> None:
    assert jpeg_signature() == "fc7643eec412531d"


@pytest.mark.parametrize("encoded", [jpeg("RGB"), jpeg("RGB")[:-100]], ids=["whole", "cut"])
def test_without_simplejpeg_no_jpeg_is_taken(encoded: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could tell these two apart; and it is no fault of the sample, which would be skipped."""
    monkeypatch.setattr(decode_module, "simplejpeg", None)
    with pytest.raises(DataError, match="pip install simplejpeg") as caught:
        decode(encoded, 24, "RGB", crop=True)
    assert not isinstance(caught.value, SampleError)


def test_a_decoder_of_other_pixels_is_another_run(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_training_data(load_config(config_path), index_folder=None).identity
    original = decode_module.decode
    monkeypatch.setattr(decode_module, "decode", lambda *args: original(*args) ^ 1)
    after = open_training_data(load_config(config_path), index_folder=None).identity
    assert {name for name in before if before[name] != after[name]} == {"data (pixels of JPEGs)"}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (jpeg("RGB")[:-2], "cannot be decoded"),
        (jpeg("RGB")[:-100], "cannot be decoded"),
        (jpeg("RGB")[:300], "cannot be decoded"),
        (b"", "cannot be decoded"),
        (b"<html>not here</html>", "cannot be decoded"),
        (b"\xff\xd8\xff", "cannot be decoded"),
        (jpeg("CMYK"), "is a CMYK image, not RGB"),
        (jpeg("RGB", (40, 25)), "is 40x25; its shorter side must be 24"),
        (webp()[:-40], "cannot be decoded"),
        (webp()[:30], "cannot be decoded"),
        (TRANSPARENT, "is a RGBA image, not RGB"),
        (webp("RGB", (40, 25)), "is 40x25; its shorter side must be 24"),
    ],
    ids=[
        *["no end", "cut", "cut early", "empty", "html", "magic only", "cmyk", "size"],
        *["webp cut", "webp cut early", "webp with alpha", "webp size"],
    ],
)
def test_what_cannot_be_decoded_raises_and_is_never_grey(
    monkeypatch: pytest.MonkeyPatch, fast: bool, encoded: bytes, message: str
) -> None:
    if not fast:
        monkeypatch.setattr(decode_module, "webp", None)
    with pytest.raises(SampleError, match=message):
        decode(encoded, 24, "RGB", crop=True)


WHOLE = jpeg("RGB", (24, 24))


@pytest.mark.parametrize(
    "encoded",
    [
        WHOLE[:20] + bytes(3) + WHOLE[20:],
        WHOLE + bytes(20),
        WHOLE.replace(b"\x03\x11\x00?\x00", b"\x03\x11\x00\x00\x00"),
    ],
    ids=["stray bytes between segments", "behind the end", "a camera's SOS parameters"],
)
def test_what_libjpeg_says_beside_the_pixels_changes_none(encoded: bytes) -> None:
    assert encoded != WHOLE
    assert (decode(encoded, 24, "RGB") == decode(WHOLE, 24, "RGB")).all()


@pytest.mark.parametrize(
    "encoded",
    [
        WHOLE[:-60] + b"\xff\xd9",
        WHOLE[:-120] + WHOLE[-60:],
        WHOLE[:-2] + b"\x12\x34" * 20 + WHOLE[-2:],
        WHOLE[:20] + bytes(3) + WHOLE[20:-2],
        WHOLE[:20] + bytes(3) + WHOLE[20:-60],
        WHOLE[:200] + bytes(8) + WHOLE[208:],
    ],
    ids=["cut and ended", "part missing", "stray bytes at the end", "no end", "cut", "zeroed tables"],
)
def test_what_libjpeg_says_of_the_pixels_is_a_damaged_sample(encoded: bytes) -> None:
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode(encoded, 24, "RGB")
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode(encoded, 24, "L")


def test_a_png_with_a_transparent_colour_is_refused_like_one_with_alpha() -> None:
    """data_prep lays it over white; here a colour would show that nobody sees."""
    encoded = saved(Image.new("RGB", (24, 24), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    with pytest.raises(SampleError, match="is RGB with a transparent colour; data_prep converts such"):
        decode(encoded, 24, "RGB")


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "BMP", "GIF"])
def test_other_formats_are_refused_before_their_decoders_see_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS would start Ghostscript."""
    stream = io.BytesIO()
    Image.new("RGB", (24, 24)).save(stream, kind)
    Image.preinit()
    Image.init()
    factory = lambda *_: pytest.fail(f"{kind}'s decoder was started")  # noqa: E731
    monkeypatch.setitem(Image.OPEN, kind, (factory, Image.OPEN[kind][1]))
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode(stream.getvalue(), 24, "RGB")


def test_whatever_a_decoder_raises_is_a_damaged_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (24, 24)).save(stream, "PNG")

    def confused(_: Image.Image) -> None:
        raise TypeError("two\nlines")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", confused)
    with pytest.raises(SampleError, match=r"cannot be decoded \(two lines\)$"):
        decode(stream.getvalue(), 24, "RGB")


def test_images_of_another_size_than_the_manifests_are_refused() -> None:
    for encoded in (jpeg("RGB"), jpeg("L")):
        with pytest.raises(SampleError, match=r"is \w+ 40x24, the manifest says 24x24"):
            decode(encoded, 24, "RGB")
    assert decode(jpeg("RGB", (24, 24)), 24, "L").shape == (1, 24, 24)
    with pytest.raises(SampleError, match="is a L image, not RGB"):
        decode(jpeg("L", (24, 24)), 24, "RGB")
