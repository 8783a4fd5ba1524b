"""Conversion of one source image to the file that a shard holds."""

import io
from dataclasses import dataclass
from typing import Any

import PIL
from PIL import Image, features

from data_prep.errors import InputError, Reject
from data_prep.jpeg import JPEG_MAGIC
from data_prep.png import PNG_MAGIC, without_metadata
from data_prep.recipe import Encoding, Recipe
from data_prep.write.images import (
    UPRIGHT,
    check_size,
    faults_are_rejects,
    load,
    open_image,
    orientation,
    to_mode,
    upright,
)
from data_prep.write.transforms import TRANSFORMS

SAVE_OPTIONS: dict[Encoding, dict[str, Any]] = {
    "webp": {"lossless": True, "method": 0, "quality": 0},  # lossless; these settings trade size for speed
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},  # 4:4:4, about 42 dB
}

KEPT_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
PNG_DEPTH_AT = 24  # offset of the bit depth in the IHDR chunk, which is always the first


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image as a file; width and height are the source's, upright; `kept`: whether its bytes are the source's."""

    data: bytes
    extension: str
    width: int
    height: int
    kept: bool


def convert(found: bytes | Image.Image, recipe: Recipe) -> EncodedImage:
    """Decode a file's bytes (or take an image), apply its orientation, convert it to mode and size, and encode it.

    Under the transform "source", bytes that only need a crop to give the wanted pixels are kept. Raises Reject for
    anything that is not a complete, unambiguous image.
    """
    if isinstance(found, bytes):
        image, extension = _read(found, recipe)
        if extension is not None:
            return EncodedImage(data=found, extension=extension, width=image.width, height=image.height, kept=True)
    else:
        image = found
        check_size(image, recipe)
    width, height = image.size
    square = TRANSFORMS[recipe.transform](to_mode(image, recipe.mode), recipe.image_size)
    square.info = {}  # otherwise encoders would copy profile and comments to every sample
    data = encode(square, recipe.encoding)
    return EncodedImage(data=data, extension=recipe.encoding, width=width, height=height, kept=False)


def encode(image: Image.Image, encoding: Encoding) -> bytes:
    """The image encoded as a file; webp and png are lossless."""
    stream = io.BytesIO()
    image.save(stream, encoding, **SAVE_OPTIONS[encoding])
    return stream.getvalue()


def _read(data: bytes, recipe: Recipe) -> tuple[Image.Image, str | None]:
    """The upright image in a complete file, and its extension where its bytes are kept."""
    with faults_are_rejects(data):
        try:
            image = open_image(data, recipe)
            if not data.startswith(JPEG_MAGIC):  # JPEGs have been checked already
                load(image, data)
            extension = _kept_extension(image, data, recipe)
            return (image if extension is not None else upright(image)), extension
        except (Reject, InputError, MemoryError):
            raise
        except Exception:  # Pillow's errors are the same for damaged metadata and damaged pixels
            if not data.startswith(PNG_MAGIC):
                raise
            plain = without_metadata(data)
            image = open_image(plain, recipe)
            load(image, plain)
            return upright(image), None


def _kept_extension(image: Image.Image, data: bytes, recipe: Recipe) -> str | None:
    """The extension of a file whose bytes need only a crop to give the wanted pixels in any decoder; else None."""
    if not recipe.keeps_bytes or min(image.size) != recipe.image_size or image.mode != recipe.mode:
        return None
    deep = image.format == "PNG" and data[PNG_DEPTH_AT] != 8
    if deep or orientation(image) != UPRIGHT or image.has_transparency_data or getattr(image, "n_frames", 1) > 1:
        return None
    return KEPT_EXTENSIONS.get(str(image.format))


def codec_versions() -> str:
    """Versions of Pillow and its codec libraries, which determine the encoded bytes."""
    libraries = {
        "libjpeg-turbo": "libjpeg_turbo",
        "libjpeg": "jpg",
        "libwebp": "webp",
        "zlib": "zlib",
        "zlib-ng": "zlib_ng",
        "OpenJPEG": "jpg_2000",
        "libavif": "avif",
        "libtiff": "libtiff",
    }
    found = {name: features.version(feature) for name, feature in libraries.items()}
    return ", ".join([f"Pillow {PIL.__version__}", *(f"{name} {found[name]}" for name in found if found[name])])
