"""A file's bytes -> an upright image of the recipe's mode, 8 bits a channel, or a Reject with its reason.

Colour profiles are not applied: the numbers in the file are taken as sRGB, as everywhere in the field.
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

BACKGROUND = "white"  # what shows through transparent pixels

# Named, because Pillow would otherwise try formats that run other programs (EPS starts Ghostscript).
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
    """Keeps Pillow's warnings off the terminal; entered once for many images, as it takes longer than opening one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def faults_are_rejects(data: bytes) -> Iterator[None]:
    """Whatever Pillow says about the bad file `data`, as a Reject."""
    try:
        yield
    except UnidentifiedImageError as error:
        reason = "truncated or corrupt" if _known_format(data) else "not an image"
        raise Reject(reason, f"begins with {data[:16]!r}") from error
    except Image.DecompressionBombError as error:
        raise Reject("decompression bomb", str(error)) from error
    except (Reject, InputError, MemoryError):
        raise
    except Exception as error:  # a broken file leads Pillow's decoders to any exception there is
        raise Reject("truncated or corrupt", f"{type(error).__name__}: {error}") from error


def open_image(data: bytes, recipe: Recipe) -> Image.Image:
    """The file's first frame, as large as the recipe asks for and with known pixels, but not decoded yet.

    Raises Reject where it is empty, too small, a decompression bomb, or of pixels whose white is unknown; Pillow's own
    errors are for `faults_are_rejects`.
    """
    if not data:
        raise Reject("empty file")
    if data.startswith(NPY_MAGIC):
        image = image_of_npy(data)
        check_size(image, recipe)
        return image
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow itself waits for twice
        raise Reject("decompression bomb", f"{image.width}x{image.height} pixels")
    check_size(image, recipe)  # before the pixels are decoded, as it is a thousand times cheaper
    _check_depth(image)
    if data.startswith(JPEG_MAGIC) and (fault := jpeg_fault(data)) is not None:
        raise Reject("truncated or corrupt", fault)
    return image


def load(image: Image.Image, data: bytes) -> None:
    """Decode the file `data` to its last pixel. Raises Reject where rows are missing, and whatever Pillow does."""
    image.load()
    if data.startswith(PNG_MAGIC) and (fault := png_fault(data, image)) is not None:
        raise Reject("truncated or corrupt", fault)


def upright(image: Image.Image) -> Image.Image:
    """The image decoded to its last pixel, and turned as its EXIF orientation says."""
    image.load()
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; UPRIGHT where there is none or the EXIF is damaged: the pixels are good without.

    A PNG must have been loaded, for its EXIF may lie behind its pixels.
    """
    try:
        found = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # a TIFF within the file, of which Pillow says as many things as of files
        return UPRIGHT
    return found if found in TURNS else UPRIGHT


def _known_format(data: bytes) -> bool:
    """Whether the file begins as one of FORMATS does."""
    return any(accept is not None and accept(data[:16]) for _, accept in map(Image.OPEN.__getitem__, FORMATS))


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
