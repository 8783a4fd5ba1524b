"""Reads image files: upright images in the recipe's mode, 8 bits per channel, or a Reject with the reason.

Colour profiles are not applied: pixel values are taken as sRGB, as is usual in the field.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from data_prep.arrays import NPY_MAGIC, image_of_npy
from data_prep.errors import InputError, Reject
from data_prep.jpeg import JPEG_MAGIC, jpeg_fault
from data_prep.png import PNG_MAGIC, png_fault
from data_prep.recipe import Mode, Recipe

BACKGROUND = "white"  # transparent pixels are composited over it

# Listed explicitly, since Pillow would also try formats that run other programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

TIFF_BLACK_IS_ZERO = 1

EXIF_ORIENTATION = 0x0112
UPRIGHT = 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def pillow_is_quiet() -> Iterator[None]:
    """A context without Pillow's warnings; entered once for many images, since it is slower than opening one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def faults_are_rejects(data: bytes) -> Iterator[None]:
    """A context that turns Pillow's errors about the file `data` into Reject."""
    try:
        yield
    except UnidentifiedImageError as error:
        known = any(accept is not None and accept(data[:16]) for _, accept in map(Image.OPEN.__getitem__, FORMATS))
        reason = "truncated or corrupt" if known else "not an image"
        raise Reject(reason, f"begins with {data[:16]!r}") from error
    except Image.DecompressionBombError as error:
        raise Reject("decompression bomb", str(error)) from error
    except (Reject, InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise Reject("truncated or corrupt", f"{type(error).__name__}: {error}") from error


def open_image(data: bytes, recipe: Recipe) -> Image.Image:
    """Open the first frame of the file, with checks of size and depth, without decoding it.

    Raises Reject where it is empty, too small, a decompression bomb, or has pixels of unknown white point; Pillow's own
    errors are for `faults_are_rejects`.
    """
    if not data:
        raise Reject("empty file")
    if data.startswith(NPY_MAGIC):
        image = image_of_npy(data)
        check_size(image, recipe)
        return image
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow raises at twice that
        raise Reject("decompression bomb", f"{image.width}x{image.height} pixels")
    check_size(image, recipe)  # before decoding, which is a thousand times slower
    _check_depth(image)
    if data.startswith(JPEG_MAGIC) and (fault := jpeg_fault(data)) is not None:
        raise Reject("truncated or corrupt", fault)
    return image


def load(image: Image.Image, data: bytes) -> None:
    """Decode the file `data` completely. Raises Reject where rows are missing, and Pillow's errors."""
    image.load()
    if data.startswith(PNG_MAGIC) and (fault := png_fault(data, image)) is not None:
        raise Reject("truncated or corrupt", fault)


def upright(image: Image.Image) -> Image.Image:
    """The completely decoded image, rotated according to its EXIF orientation."""
    image.load()
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; UPRIGHT where there is none or the EXIF is damaged, which leaves the pixels usable.

    A PNG must have been loaded, since its EXIF may come after the pixels.
    """
    try:
        found = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # EXIF is a TIFF, for which Pillow raises as many types as for files
        return UPRIGHT
    return found if found in TURNS else UPRIGHT


def check_size(image: Image.Image, recipe: Recipe) -> None:
    """Raise Reject where the image would have to be upscaled and that was not requested."""
    if min(image.size) < recipe.image_size and not recipe.upscale:
        raise Reject(
            f"smaller than --size {recipe.image_size} (--upscale would enlarge)", f"{image.width}x{image.height}"
        )


def to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    """Convert any of Pillow's modes to `mode`: transparency is laid over BACKGROUND, 16-bit grey scaled to 8 bits.

    Raises Reject where Pillow has no conversion.
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


def _check_depth(image: Image.Image) -> None:
    """Reject pixels whose white point is not known to be 255 or 65535: they would become black, or inverted."""
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
    """Scale 0..65535 to 0..255, rounded; Pillow's own convert("L") clips at 255, which makes such images white."""
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
