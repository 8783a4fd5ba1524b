"""A file's bytes -> an upright image of the recipe's mode, 8 bits a channel, or a Reject with its reason.

Colour profiles are not applied: the numbers in the file are taken as sRGB, as everywhere in the field.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from data_prep.arrays import NPY_MAGIC, image_of_npy
from data_prep.errors import Reject
from data_prep.recipe import Mode, Recipe

BACKGROUND = "white"  # what shows through transparent pixels

# Named, because Pillow would otherwise try formats that run other programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

TIFF_BLACK_IS_ZERO = 1


def open_image(data: bytes, recipe: Recipe) -> Image.Image:
    """The file's first frame, as large as the recipe asks for and with known pixels, but not decoded yet.

    Raises Reject where it is no image, a decompression bomb, too small, or of pixels whose white is unknown.
    """
    if not data:
        raise Reject("empty file")
    if data.startswith(NPY_MAGIC):
        image = image_of_npy(data)
        check_size(image, recipe)
        return image
    with faults_are_rejects(data):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(image, recipe)  # before the pixels are decoded, as it is a thousand times cheaper
        _check_depth(image)
        return image


def decode_upright(image: Image.Image, data: bytes) -> Image.Image:
    """Decode what `open_image` made of `data` to its last pixel, and turn it as its EXIF orientation says.

    Raises Reject where a pixel is missing or broken.
    """
    with faults_are_rejects(data):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image


def check_size(image: Image.Image, recipe: Recipe) -> None:
    """Raise Reject where the image would have to be enlarged and that was not asked for."""
    if min(image.size) < recipe.image_size and not recipe.upscale:
        raise Reject(
            f"smaller than --size {recipe.image_size} (--upscale would enlarge)", f"{image.width}x{image.height}"
        )


def to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    """Any of Pillow's modes -> `mode`; transparency is laid over BACKGROUND, 16-bit grey is scaled to 8 bits.

    Raises Reject where Pillow knows no way.
    """
    if image.mode.startswith("I"):
        image = _scale_16_bit_grey(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise Reject("unsupported pixels", f"mode {image.mode}: {error}") from error


@contextmanager
def faults_are_rejects(data: bytes) -> Iterator[None]:
    """Whatever Pillow says about a bad file, as a Reject."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except UnidentifiedImageError as error:
            raise Reject("not an image", f"begins with {data[:16]!r}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise Reject("decompression bomb", str(error)) from error
        except (Reject, MemoryError):
            raise
        except Exception as error:  # a broken file leads Pillow's decoders to any exception there is
            raise Reject("truncated or corrupt", f"{type(error).__name__}: {error}") from error


def _check_depth(image: Image.Image) -> None:
    """Reject pixels whose white point is not known to be 255 or 65535: they would come out black, or inverted."""
    if image.mode == "F":
        raise Reject("unsupported pixels", "floats of unknown range; convert to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return
    if "transparency" in image.info:
        raise Reject("unsupported pixels", "16-bit grey with a transparent colour; flatten it first")
    if isinstance(image, TiffImageFile):  # PGM and old Pillow's PNG also use mode "I", but for 16 bits
        bits, zero_is = image.tag_v2.get(BITSPERSAMPLE), image.tag_v2.get(PHOTOMETRIC_INTERPRETATION)
        if image.mode == "I" or bits != (16,) or zero_is != TIFF_BLACK_IS_ZERO:
            raise Reject("unsupported pixels", f"signed, or {bits} bits, or PhotometricInterpretation {zero_is}")


def _scale_16_bit_grey(image: Image.Image) -> Image.Image:
    """0..65535 -> 0..255, rounded; Pillow's own convert("L") clips at 255 and turns such images white."""
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
