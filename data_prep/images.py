"""One image as it was found -> one square image of the recipe's size and mode, or a Reject with its reason.

Colour profiles are not applied: the numbers in the file are taken as sRGB, as everywhere in the field.
"""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from data_prep.errors import Reject
from data_prep.recipe import Encoding, Mode, Recipe, Resample

BACKGROUND = "white"  # what shows through transparent pixels

# Named, because Pillow would otherwise try formats that run other programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

FILTERS: dict[Resample, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}

SAVE_OPTIONS: dict[Encoding, dict[str, Any]] = {
    "webp": {"lossless": True, "method": 0, "quality": 0},  # still exact: these trade size for speed
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},  # 4:4:4, about 42 dB
}

TIFF_BLACK_IS_ZERO = 1


def prepare(found: bytes | Image.Image, recipe: Recipe) -> Image.Image:
    """Turn a file's bytes (or an image) upright, crop its middle square, bring it to size and mode.

    Returns an image of `recipe.image_size` squared in `recipe.mode`, 8 bits a channel, without metadata.
    Raises Reject for anything that is not wholly and exactly such an image.
    """
    image = _decode(found, recipe) if isinstance(found, bytes) else found
    _check_size(image, recipe)
    image = _to_mode(_centre_square(image), recipe.mode)
    target = (recipe.image_size, recipe.image_size)
    if image.size != target:
        image = image.resize(target, FILTERS[recipe.resample])
    image.info = {}  # or the encoders would write the source's profile and comments into every sample
    return image


def encode(image: Image.Image, encoding: Encoding) -> bytes:
    """The image as one file's bytes; webp and png are lossless."""
    stream = io.BytesIO()
    image.save(stream, encoding, **SAVE_OPTIONS[encoding])
    return stream.getvalue()


def _decode(data: bytes, recipe: Recipe) -> Image.Image:
    """The first frame, decoded to its last pixel and turned upright."""
    if not data:
        raise Reject("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image, recipe)  # before the pixels are decoded, as it is a thousand times cheaper
            _check_depth(image)
            return ImageOps.exif_transpose(image)  # this decodes the pixels
        except UnidentifiedImageError as error:
            raise Reject("not an image", f"begins with {data[:16]!r}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise Reject("decompression bomb", str(error)) from error
        except (Reject, MemoryError):
            raise
        except Exception as error:  # a broken file leads Pillow's decoders to any exception there is
            raise Reject("truncated or corrupt", f"{type(error).__name__}: {error}") from error


def _check_size(image: Image.Image, recipe: Recipe) -> None:
    if min(image.size) < recipe.image_size and not recipe.upscale:
        raise Reject(
            f"smaller than --size {recipe.image_size} (--upscale would enlarge)", f"{image.width}x{image.height}"
        )


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


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


def _to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    """Any of Pillow's modes -> `mode`; transparency is laid over BACKGROUND, 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I"):
        image = _scale_16_bit_grey(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return image.convert(mode)
    except ValueError as error:
        raise Reject("unsupported pixels", f"mode {image.mode}: {error}") from error


def _scale_16_bit_grey(image: Image.Image) -> Image.Image:
    """0..65535 -> 0..255, rounded; Pillow's own convert("L") clips at 255 and turns such images white."""
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
