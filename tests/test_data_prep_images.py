"""Promises of the transform: every awkward image comes out right, or is rejected with its reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffTags

from data_prep.errors import Reject
from data_prep.png import png_fault
from data_prep.recipe import Recipe
from data_prep.write.convert import convert, encode
from trainer.data.decode import decode
from trainer.errors import SampleError

SIDE = 16


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def file_of(image: Image.Image, encoding: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, encoding, **options)
    return stream.getvalue()


def prepared(data: bytes, **recipe: object) -> np.ndarray:
    options = {"image_size": SIDE, "encoding": "png", **recipe}
    image = Image.open(io.BytesIO(convert(data, Recipe(**options)).data))
    assert image.size == (SIDE, SIDE)
    assert image.mode == options.get("mode", "RGB")
    return np.asarray(image)


def reason(data: bytes, **recipe: object) -> str:
    with pytest.raises(Reject) as caught:
        convert(data, Recipe(**{"image_size": SIDE, **recipe}))
    return caught.value.reason


@pytest.mark.parametrize(("height", "width"), [(16, 21), (22, 16), (16, 16)])
def test_right_sized_shorter_side_is_a_pure_centre_crop(height: int, width: int) -> None:
    pixels = noise(height, width)
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    out = prepared(file_of(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(out, pixels[top : top + SIDE, left : left + SIDE])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = noise(16, 24)
    # How a camera would have stored it: the inverse of what the orientation tells a viewer to do.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(prepared(data), upright[:, 4:20])


def test_cmyk_becomes_rgb() -> None:
    cyan = Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0))
    out = prepared(file_of(cyan, "TIFF"))
    np.testing.assert_array_equal(out, np.full((SIDE, SIDE, 3), (0, 255, 255)))


def test_grey_becomes_three_equal_channels_and_comes_back() -> None:
    grey = noise(SIDE, SIDE, channels=1)
    data = file_of(Image.fromarray(grey), "PNG")
    np.testing.assert_array_equal(prepared(data), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(prepared(data, mode="L"), grey)


def test_one_bit_becomes_black_and_white() -> None:
    bits = noise(SIDE, SIDE, channels=1) > 127
    data = file_of(Image.fromarray(bits), "PNG")
    np.testing.assert_array_equal(prepared(data, mode="L"), np.where(bits, 255, 0))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_laid_over_white(mode: str) -> None:
    grey, alpha = noise(SIDE, SIDE, 1, seed=1), noise(SIDE, SIDE, 1, seed=2)
    bands = [Image.fromarray(grey)] * (len(mode) - 1) + [Image.fromarray(alpha)]
    out = prepared(file_of(Image.merge(mode, bands), "PNG")).astype(float)
    share = alpha[..., None] / 255
    expected = grey[..., None] * share + 255 * (1 - share)
    assert np.abs(out - expected).max() <= 1


def test_transparent_palette_entries_become_white() -> None:
    indices = noise(SIDE, SIDE, channels=1) % 3
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette = np.array([[10, 20, 30], [255, 255, 255], [70, 80, 90]], np.uint8)
    np.testing.assert_array_equal(prepared(file_of(image, "PNG", transparency=1)), palette[indices])
    np.testing.assert_array_equal(prepared(file_of(image, "GIF", transparency=1)), palette[indices])


@pytest.mark.parametrize("encoding", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(encoding: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    out = prepared(file_of(Image.fromarray(values), encoding), mode="L")
    np.testing.assert_array_equal(out, np.round(values / 257))


@pytest.mark.parametrize("encoding", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(encoding: str) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime", "blue")]
    data = file_of(
        frames[0],
        encoding,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if encoding == "WEBP" else {}),
    )
    np.testing.assert_array_equal(prepared(data), np.full((SIDE, SIDE, 3), (255, 0, 0)))


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated_is_rejected(encoding: str, part: float) -> None:
    data = file_of(Image.fromarray(noise(64, 64)), encoding)
    assert reason(data[: int(len(data) * part)]) in {"truncated or corrupt", "not an image"}


def test_other_content_is_rejected_whatever_its_name() -> None:
    assert reason(b"") == "empty file"
    assert reason(b"<!DOCTYPE html><html>404</html>") == "not an image"
    assert reason(bytes(1000)) == "not an image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n") == "not an image"


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_tiff_of_unknown_range_is_rejected(dtype: type) -> None:
    pixels = noise(SIDE, SIDE, channels=1).astype(dtype)
    assert reason(file_of(Image.fromarray(pixels), "TIFF")) == "unsupported pixels"


@pytest.mark.parametrize("tag", [{"PhotometricInterpretation": 0}, {"SampleFormat": 2}, {"BitsPerSample": 12}])
def test_tiff_of_16_bits_in_name_only_is_rejected(tag: dict[str, int]) -> None:
    tags = {TiffTags.lookup(number).name: number for number in (258, 262, 339)}
    data = bytearray(file_of(Image.fromarray(np.full((SIDE, SIDE), 65535, np.uint16)), "TIFF", tiffinfo={339: 1}))
    for name, value in tag.items():
        entry = data.index(struct.pack("<HHI", tags[name], 3, 1))  # tag, SHORT, one value
        data[entry + 8 : entry + 10] = struct.pack("<H", value)
    assert reason(bytes(data)) == "unsupported pixels"


def test_16_bit_grey_with_a_transparent_colour_is_rejected() -> None:
    image = Image.fromarray(np.zeros((SIDE, SIDE), np.uint16))
    data = file_of(image, "PNG")
    assert prepared(data).max() == 0
    chunk = b"tRNS" + bytes(2)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = data.index(b"IDAT") - 4
    assert reason(data[:at] + chunk + data[at:]) == "unsupported pixels"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_rejected_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(Image.new("1", (100, 100)), "PNG")
    for limit in (9_000, 4_000):  # Pillow warns from the limit on and raises from twice the limit on
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert reason(data) == "decompression bomb"


def test_too_small_is_rejected_unless_upscaled() -> None:
    pixels = noise(8, 30)
    data = file_of(Image.fromarray(pixels), "PNG")
    assert "smaller than --size 16" in reason(data)
    expected = Image.fromarray(np.ascontiguousarray(pixels[:, 11:19])).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(prepared(data, upscale=True), np.asarray(expected))


@pytest.mark.parametrize("encoding", ["webp", "png"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_lossless_encodings_keep_every_pixel(encoding: str, mode: str) -> None:
    image = Image.fromarray(noise(SIDE, SIDE, 3 if mode == "RGB" else 1))
    stored = Image.open(io.BytesIO(encode(image, encoding)))
    np.testing.assert_array_equal(np.asarray(stored.convert(mode)), np.asarray(image))


def test_jpeg_is_quality_95_without_chroma_subsampling() -> None:
    stored = Image.open(io.BytesIO(encode(Image.fromarray(noise(SIDE, SIDE)), "jpeg")))
    assert [component[1:3] for component in stored.layer] == [(1, 1)] * 3
    assert stored.quantization[0][0] == 2  # 16 * (200 - 2*95) / 100, rounded
    assert Image.open(io.BytesIO(encode(Image.fromarray(noise(SIDE, SIDE, 1)), "jpeg"))).mode == "L"


@pytest.mark.parametrize("encoding", ["webp", "png", "jpeg"])
def test_metadata_of_the_source_is_not_stored(encoding: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    data = file_of(
        Image.fromarray(noise(SIDE, SIDE)), "JPEG", exif=exif, icc_profile=b"secret profile", comment=b"secret"
    )
    assert b"secret" in data
    assert b"secret" not in convert(data, Recipe(image_size=SIDE, transform="area", encoding=encoding)).data


EXIF_OF_NO_TIFF = b"Exif\0\0" + b"no TIFF header and no orientation"


@pytest.mark.parametrize("transform", ["ddpm", "source"])
@pytest.mark.parametrize(
    ("encoding", "options"),
    [("JPEG", {"quality": 95, "dpi": (72, 72)}), ("WEBP", {"lossless": True}), ("PNG", {})],
    ids=["JPEG", "WEBP", "PNG"],
)
def test_damaged_exif_beside_good_pixels_keeps_the_image(
    encoding: str, options: dict[str, object], transform: str
) -> None:
    plain = file_of(Image.fromarray(noise(SIDE, SIDE)), encoding, **options)
    data = file_of(Image.fromarray(noise(SIDE, SIDE)), encoding, exif=EXIF_OF_NO_TIFF, **options)
    assert EXIF_OF_NO_TIFF[6:] in data
    np.testing.assert_array_equal(prepared(data, transform=transform), np.asarray(Image.open(io.BytesIO(plain))))


def with_chunk(png: bytes, kind: bytes, content: bytes, *, damage: int = 0) -> bytes:
    """The PNG with one more chunk behind its IHDR; `damage` is added to the chunk's checksum."""
    checksum = zlib.crc32(kind + content) + damage & 0xFFFFFFFF
    return png[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum) + png[33:]


TEXT_BOMB = b"k\0\0" + zlib.compress(bytes(1 << 21), 9)


@pytest.mark.parametrize("transform", ["ddpm", "source"])
@pytest.mark.parametrize(
    ("kind", "content", "damage"),
    [(b"tEXt", b"k\0v", 1), (b"iCCP", b"x", 0), (b"zTXt", TEXT_BOMB, 0)],
    ids=["checksum", "profile", "text that unpacks to more than Pillow takes"],
)
def test_a_damaged_chunk_beside_the_pixels_of_a_png_keeps_the_image(
    kind: bytes, content: bytes, damage: int, transform: str
) -> None:
    pixels = noise(SIDE, SIDE)
    exif = Image.Exif()
    exif[0x0112] = 3
    data = with_chunk(file_of(Image.fromarray(pixels), "PNG", exif=exif), kind, content, damage=damage)
    np.testing.assert_array_equal(prepared(data, transform=transform), pixels[::-1, ::-1])


@pytest.mark.parametrize("transform", ["ddpm", "source"])
@pytest.mark.parametrize("at", [-20, 45])
def test_a_damaged_chunk_of_a_pngs_pixels_is_rejected(at: int, transform: str) -> None:
    data = bytearray(file_of(Image.fromarray(noise(SIDE, SIDE)), "PNG"))
    data[at] ^= 1
    assert reason(bytes(data), transform=transform) == "truncated or corrupt"


def png_of_rows(rows: int, mode: str = "RGB", *, last: int = 255) -> bytes:
    """A PNG of SIDE rows, of which only `rows` have data, in a zlib stream that says it is finished."""
    depth, colours, length = {"RGB": (8, 2, 3 * SIDE), "L": (8, 0, SIDE), "1": (1, 0, SIDE // 8)}[mode]
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colours, 0, 0, 0)
    pixels = (b"\0" + b"\xff" * length) * (rows - 1) + b"\0" + bytes([last]) * length
    png = file_of(Image.new("L", (1, 1)), "PNG")[:8]
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        checksum = zlib.crc32(kind + content)
        png += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return png


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_a_png_whose_data_end_early_is_no_black_area(mode: str) -> None:
    for rows in (1, SIDE // 2, SIDE - 1):
        for transform in ("ddpm", "source"):
            assert reason(png_of_rows(rows, mode), transform=transform) == "truncated or corrupt"
        with pytest.raises(SampleError, match=r"bytes of pixels|is a 1 image"):
            decode(png_of_rows(rows, mode), SIDE, "RGB", crop=True)
    prepared(png_of_rows(SIDE, mode, last=0))
    prepared(png_of_rows(SIDE, mode, last=255))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_a_black_png_is_whole(mode: str) -> None:
    """Of several pieces to unpack, and compressed a thousandfold."""
    black = Image.new(mode, (1501, 1499))
    assert png_fault(data := file_of(black, "PNG"), black) is None
    assert png_fault(data[:-12], black) is None  # without its end mark


@pytest.mark.parametrize("encoding", ["PNG", "GIF", "TIFF", "WEBP", "AVIF"])
def test_a_file_cut_within_its_header_is_said_to_be_cut(encoding: str) -> None:
    assert reason(file_of(Image.fromarray(noise(SIDE, SIDE)), encoding)[:40]) == "truncated or corrupt"
