"""Decoding of images: JPEGs by simplejpeg, lossless WebPs by webp where that is installed, everything else by Pillow.

docs/stream.md, "Decoding", has why. What the fast decoders reject is left to Pillow, so which images count as damaged
does not depend on what is installed.
"""

import base64
import hashlib
import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.arrays import array_of_npy
from data_prep.format import CHANNELS, FormatError, center_crop_box
from data_prep.jpeg import JPEG_MAGIC, NEEDS_SIMPLEJPEG, hole_of_zeros, jpeg_fault
from data_prep.png import PNG_MAGIC, png_fault
from trainer.errors import DataError, SampleError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
try:
    import webp
except ImportError:
    webp = None  # type: ignore[assignment]

_WEBP_LOSSLESS = re.compile(rb"RIFF.{4}WEBPVP8L.{4}\x2f(.{4})", re.DOTALL)  # WebPs without further chunks
_FORMATS = ("JPEG", "PNG", "WEBP")  # no other decoder of Pillow, or program that it starts (Ghostscript), is run
_FAST_COLOURS = {"RGB": {"YCbCr", "RGB"}, "L": {"Gray"}}  # without colour conversion; the rest is left to Pillow

# 20 x 20 pixels of smooth noise, quality 75, 4:2:0: its pixels depend on the DCT, the upsampling and the conversion.
_PROBE = base64.b64decode(
    """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcpLDAxNDQ0Hyc5PTgy
PC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjL/wAARCAAUABQD
ASIAAhEBAxEB/8QAGQABAQADAQAAAAAAAAAAAAAAAAYCBAcF/8QAJBAAAQMDBAIDAQAAAAAAAAAAAQACAwQFEQYSEyEUIiQxQVH/xAAZAQACAwEA
AAAAAAAAAAAAAAAEBQEDBgf/xAAkEQACAQMCBgMAAAAAAAAAAAABAgADBBEFIQYSIjFRsRMUgv/aAAwDAQACEQMRAD8AtdRXl9BGKfhJ5PXdj6yp
E2SCjqBOahuZTnGVnctdxXmB3xgHAdeva8rT1sqNRTSVFRO6FkJyA7rICr0+xq2Vqgfo5c/vPrEmnVtK1b7Cph17nzLWG2F0TS1wII/iLRF/goxw
cjHbOsn9RIHYlifgMCbXsE9BnO4Gjy4gOgSM4VrcR4drYKf03MOcIi2fEm15YgdsmE3gxpzEeR7nNXzyuleXSOJ3H9REXS1pJgbCPEReUbT/2Q==
"""
)


def decode(encoded: bytes, size: int, mode: str, *, crop: bool = False) -> npt.NDArray[np.uint8]:
    """Decode one image to (C, size, size) uint8; see `decode_into`."""
    return decode_square(encoded, mode, size, crop=crop).transpose(2, 0, 1)


def decode_into(out: npt.NDArray[np.uint8], encoded: bytes, mode: str, *, crop: bool = False) -> None:
    """Decode one image to `out`, (size, size, C) uint8, contiguous; mode is "RGB" or "L".

    `crop`: the image has a shorter side of `size`; its centre square is taken, and a grey image is converted to the
    mode. Otherwise it must be of that size and mode, since data_prep resizes and converts. Raises SampleError where it
    is not, or cannot be decoded completely; the content of `out` is then undefined. Raises DataError for a JPEG where
    simplejpeg is missing.
    """
    is_jpeg = encoded.startswith(JPEG_MAGIC)
    fast = _decode_jpeg if is_jpeg else _decode_webp
    if fast(out, encoded, mode, crop=crop):
        return
    if is_jpeg and (fault := jpeg_fault(encoded)) is not None:
        raise SampleError(f"cannot be decoded ({fault})")
    _decode_by_pillow(out, encoded, mode, crop=crop)


def decode_square(encoded: bytes, mode: str, side: int | None, *, crop: bool) -> npt.NDArray[np.uint8]:
    """Decode one image to (side, side, C) uint8, see `decode_into`; side None: its own shorter side."""
    if side is None:
        try:
            with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                side = min(image.size)
        except Exception as error:  # as in `_decode_by_pillow`
            raise SampleError(f"cannot be decoded ({' '.join(str(error).split())})") from error
    pixels = np.empty((side, side, CHANNELS[mode]), dtype=np.uint8)
    decode_into(pixels, encoded, mode, crop=crop)
    return pixels


def decode_text(data: bytes) -> str:
    """A caption. Raises SampleError where it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"cannot be decoded ({error})") from error


def decode_array(data: bytes) -> npt.NDArray[Any]:
    """An array of numbers in numpy's format. Raises SampleError for anything else, pickles included."""
    try:
        found = array_of_npy(data)
    except ValueError as error:
        raise SampleError(f"is no array of numbers ({error})") from error
    return found.astype(found.dtype.newbyteorder("="), copy=False)


def jpeg_signature() -> str:
    """A hash of decoded pixels that identifies the JPEG decoder: equal for two decoders that agree."""
    return hashlib.sha256(decode(_PROBE, 20, "RGB").tobytes()).hexdigest()[:16]


def _decode_webp(out: npt.NDArray[np.uint8], encoded: bytes, mode: str, *, crop: bool) -> bool:
    """Like `_decode_jpeg`, for lossless WebP; Pillow decodes it as an animation, with three copies of the image."""
    if webp is None or mode != "RGB" or (header := _WEBP_LOSSLESS.match(encoded)) is None:
        return False
    bits = int.from_bytes(header[1], "little")  # width - 1 and height - 1, 14 bits each, then the alpha flag
    if bits >> 28:
        return False
    left, top, right, bottom = _box((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, len(out), mode, crop=crop)
    try:
        out[:] = webp.WebPData.from_buffer(encoded).decode(webp.WebPColorMode.RGB)[top:bottom, left:right]
    except webp.WebPError:
        return False
    return True


def _decode_jpeg(out: npt.NDArray[np.uint8], encoded: bytes, mode: str, *, crop: bool) -> bool:
    """Like `decode_into`; False where Pillow has to decode it."""
    if simplejpeg is None:
        raise DataError(NEEDS_SIMPLEJPEG)
    if hole_of_zeros(encoded) is not None:
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours not in _FAST_COLOURS[mode]:
            return False
        left, top, right, bottom = _box(width, height, len(out), mode, crop=crop)
        wanted = "RGB" if mode == "RGB" else "GRAY"
        if width == height:
            simplejpeg.decode_jpeg(encoded, wanted, buffer=out)  # without a copy
        else:
            out[:] = simplejpeg.decode_jpeg(encoded, wanted)[top:bottom, left:right]
    except ValueError:  # also raised for stray bytes between segments
        return False
    return True


def _decode_by_pillow(out: npt.NDArray[np.uint8], encoded: bytes, mode: str, *, crop: bool) -> None:
    accepted = {mode, "RGB", *(["L"] if crop else [])}
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            box = _box(image.width, image.height, len(out), image.mode, crop=crop)
            if image.mode not in accepted:
                raise SampleError(f"is a {image.mode} image, not {mode}; data_prep converts such")
            if "transparency" in image.info:
                raise SampleError(f"is {image.mode} with a transparent colour; data_prep converts such")
            image.load()
            if encoded.startswith(PNG_MAGIC) and (fault := png_fault(encoded, image)) is not None:
                raise SampleError(f"cannot be decoded ({fault})")
            found = image if image.mode == mode else image.convert(mode)
            out[:] = np.asarray(found if image.width == image.height else found.crop(box)).reshape(out.shape)
    except SampleError:
        raise
    except Exception as error:  # Pillow raises many types on damaged data: struct.error, TypeError, ...
        raise SampleError(f"cannot be decoded ({' '.join(str(error).split())})") from error


def _box(width: int, height: int, size: int, mode: str, *, crop: bool) -> tuple[int, int, int, int]:
    if crop:
        try:
            return center_crop_box(width, height, size)
        except FormatError as error:
            raise SampleError(f"{error}; data_prep resizes such") from error
    if (width, height) != (size, size):
        raise SampleError(f"is {mode} {width}x{height}, the manifest says {size}x{size}")
    return 0, 0, size, size
