"""Promises of the transforms: the pixels of those they are named after, and kept bytes that read as those pixels."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import Reject
from data_prep.format import FormatError, center_crop_box, load_manifest
from data_prep.inspection.dataset import Dataset
from data_prep.recipe import TRANSFORMS, Recipe
from data_prep.write.convert import EncodedImage, convert
from tests.data_prep_harness import data_prep, error_line, file_of, noise, pixels_of_noise

SIDE = 16
SHAPES = [(16, 16), (16, 21), (22, 16), (31, 32), (33, 47), (40, 51), (64, 150), (67, 66)]


def stylegan2_lsun(pixels: np.ndarray) -> np.ndarray:
    """What StyleGAN2's dataset_tool.py makes of an LSUN image: rows and columns (n - crop) // 2 to (n + crop) // 2."""
    crop = min(pixels.shape[:2])
    rows, columns = (slice((n - crop) // 2, (n + crop) // 2) for n in pixels.shape[:2])
    square = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def guided_diffusion(pixels: np.ndarray) -> np.ndarray:
    """What guided-diffusion's image_datasets.py makes of an image: shrunk first and cropped last."""
    image = Image.fromarray(pixels)
    while min(image.size) // 2 >= SIDE:
        image = image.resize([n // 2 for n in image.size], Image.Resampling.BOX)
    shorter = min(image.size)
    image = image.resize([round(n * (SIDE / shorter)) for n in image.size], Image.Resampling.BICUBIC)
    shrunk = np.asarray(image)
    top, left = ((n - SIDE) // 2 for n in shrunk.shape[:2])
    return shrunk[top:, left:][:SIDE, :SIDE]


def area_mean(pixels: np.ndarray) -> np.ndarray:
    """The mean below each pixel, for a middle square whose side is a multiple of SIDE."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side].astype(float)
    factor = side // SIDE
    return square.reshape(SIDE, factor, SIDE, factor, 3).mean(axis=(1, 3))


def converted(pixels: np.ndarray, transform: str) -> np.ndarray:
    recipe = Recipe(image_size=SIDE, transform=transform, encoding="png")
    member = convert(file_of(Image.fromarray(pixels), "PNG"), recipe)
    return np.asarray(Image.open(io.BytesIO(member.data)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("transform", "reference"), [("ddpm", stylegan2_lsun), ("edm", stylegan2_lsun), ("adm", guided_diffusion)]
)
def test_each_transform_gives_the_pixels_of_whom_it_is_named_after(
    transform: str, reference: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int]
) -> None:
    pixels = pixels_of_noise(*shape, seed=0)
    np.testing.assert_array_equal(converted(pixels, transform), reference(pixels))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 2)])
def test_a_line_is_enlarged_in_bounded_memory(
    transform: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    resize = Image.Image.resize

    def counted(image: Image.Image, size: tuple[int, int], *arguments: object, **options: object) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    recipe = Recipe(image_size=128, transform=transform, encoding="png", upscale=True)
    member = convert(file_of(Image.fromarray(pixels_of_noise(*shape, seed=0)), "PNG"), recipe)
    assert Image.open(io.BytesIO(member.data)).size == (128, 128)
    assert max(made) <= 1 << 26


@pytest.mark.parametrize("shape", [(5, 300), (301, 4), (3, 3), (7, 11)])
def test_the_middle_of_a_line_is_enlarged_as_all_of_it(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(Image.fromarray(96 + pixels_of_noise(*shape, seed=0) // 4), "PNG")  # bicubic stays within 0..255
    recipe = Recipe(image_size=SIDE, transform="adm", encoding="png", upscale=True)
    whole = np.asarray(Image.open(io.BytesIO(convert(data, recipe).data))).astype(int)
    monkeypatch.setattr("data_prep.write.transforms.MOST_PIXELS", 0)
    part = np.asarray(Image.open(io.BytesIO(convert(data, recipe).data))).astype(int)
    assert np.abs(whole - part).max() <= 1


def test_area_is_the_mean_of_the_area() -> None:
    pixels = pixels_of_noise(48, 61, seed=0)
    assert np.abs(converted(pixels, "area") - area_mean(pixels)).max() < 1  # Pillow rounds rows, then columns


def test_the_transforms_differ_where_they_should() -> None:
    pixels = pixels_of_noise(70, 90, seed=0)
    assert len({converted(pixels, transform).tobytes() for transform in ("ddpm", "adm", "area")}) == 3


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("height", "width"), [(16, 21), (22, 16), (16, 16)])
def test_a_shorter_side_of_the_right_size_is_a_pure_crop(transform: str, height: int, width: int) -> None:
    pixels = pixels_of_noise(height, width, seed=0)
    image = Image.open(io.BytesIO(file_of(Image.fromarray(pixels), "PNG")))
    member = convert(file_of(image, "PNG"), Recipe(image_size=SIDE, transform=transform, encoding="png"))
    stored = Image.open(io.BytesIO(member.data))
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    crop = np.asarray(stored.crop(center_crop_box(*stored.size, SIDE)))
    np.testing.assert_array_equal(crop, pixels[top : top + SIDE, left : left + SIDE])


def test_center_crop_box_rounds_down_and_refuses_another_size() -> None:
    assert center_crop_box(21, 16, 16) == (2, 0, 18, 16)
    assert center_crop_box(16, 19, 16) == (0, 1, 16, 17)
    assert center_crop_box(16, 16, 16) == (0, 0, 16, 16)
    with pytest.raises(FormatError, match="is 20x17; its shorter side must be 16"):
        center_crop_box(20, 17, 16)


# Source: bytes that can be kept are


def passed(data: bytes, **recipe: object) -> EncodedImage:
    return convert(data, Recipe(**{"image_size": SIDE, "transform": "source", **recipe}))


@pytest.mark.parametrize(
    ("encoding", "extension", "mode"),
    [("JPEG", "jpg", "RGB"), ("PNG", "png", "RGB"), ("WEBP", "webp", "RGB"), ("JPEG", "jpg", "L"), ("PNG", "png", "L")],
)
def test_bytes_of_the_right_size_are_kept(encoding: str, extension: str, mode: str) -> None:
    data = file_of(noise(16, 23, seed=0).convert(mode), encoding)
    member = passed(data, mode=mode)
    assert (member.data, member.extension, member.kept) == (data, extension, True)
    assert (member.width, member.height) == (23, 16)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_of_16_bits_a_channel() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(range(6)) * SIDE for _ in range(SIDE))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RGB = noise(16, 23, seed=0)
FRAMES = {"save_all": True, "append_images": [noise(16, 23, seed=1)]}


@pytest.mark.parametrize(
    "data",
    [
        file_of(noise(17, 23, seed=0), "PNG"),
        file_of(RGB, "BMP"),
        file_of(RGB.convert("L"), "PNG"),
        file_of(RGB.convert("CMYK"), "JPEG"),
        file_of(RGB.convert("P"), "PNG"),
        file_of(RGB.convert("RGBA"), "PNG"),
        file_of(RGB, "PNG", transparency=(1, 2, 3)),
        file_of(RGB, "JPEG", exif=exif_of(6)),
        file_of(RGB, "PNG", exif=exif_of(3)),
        file_of(RGB, "WEBP", **FRAMES),
        file_of(RGB, "PNG", **FRAMES),
        png_of_16_bits_a_channel(),
    ],
    ids=[
        "larger",
        "BMP",
        "grey",
        "CMYK",
        "palette",
        "alpha",
        "colour-key",
        "turned-JPEG",
        "turned-PNG",
        "WebP-frames",
        "PNG-frames",
        "16-bit",
    ],
)
def test_what_needs_more_than_a_crop_is_encoded_anew_as_ddpm_would(data: bytes) -> None:
    member = passed(data)
    assert (member.kept, member.extension) == (False, "webp")
    expected = convert(data, Recipe(image_size=SIDE, transform="ddpm"))
    assert member.data == expected.data


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP"])
def test_bytes_are_kept_only_if_they_decode(encoding: str) -> None:
    data = file_of(noise(16, 40, seed=0), encoding)
    with pytest.raises(Reject, match="truncated or corrupt"):
        passed(data[: len(data) * 9 // 10])


def test_a_source_dataset_reads_as_the_ddpm_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    noise(16, 20, seed=0).save(source / "a.jpg", quality=75)
    noise(25, 16, seed=1).save(source / "b.webp", quality=75)
    (source / "c.bmp").write_bytes(file_of(noise(16, 17, seed=2), "PNG"))
    noise(40, 50, seed=3).save(source / "d.png")
    options = ["--size", SIDE, "--workers", 1]
    assert data_prep(source, tmp_path / "ddpm", *options) == 0
    capsys.readouterr()
    assert data_prep(source, tmp_path / "source", *options, "--transform", "source") == 0
    assert "3 with the source's bytes, 1 encoded anew" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "source")
    assert (manifest.encoding, manifest.transform, manifest.report["kept"]) == ("source", "source", 3)
    kept, made = Dataset.open(tmp_path / "source"), Dataset.open(tmp_path / "ddpm")
    for i in range(4):
        np.testing.assert_array_equal(np.asarray(kept.read(i)), np.asarray(made.read(i)))
    tar = (tmp_path / "source" / "shard-000000.tar").read_bytes()
    extensions = {"a.jpg": "jpg", "b.webp": "webp", "c.bmp": "png"}  # by content, not by name
    for row, name in zip(kept.index, extensions):
        assert tar[row["offset"] : row["offset"] + row["length"]] == (source / name).read_bytes()
        header = tar[row["offset"] - 512 : row["offset"]]
        assert header[:100].rstrip(b"\0").decode() == f"{row['key']:09d}.{extensions[name]}"


def test_source_with_jpeg_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(16, 16, seed=0).save(tmp_path / "a.png")
    assert data_prep(tmp_path, tmp_path.parent / "out", "--transform", "source", "--format", "jpeg") == 2
    assert "--format jpeg" in error_line(capsys)
