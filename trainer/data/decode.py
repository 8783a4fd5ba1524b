"""Encoded bytes to pixels.

JPEGs are decoded by simplejpeg, lossless WebPs by webp where that is installed (the extra `fast`), and everything else
by Pillow. simplejpeg and Pillow wrap libjpeg-turbo and agree to the last bit; that other versions do is no law, so
`jpeg_signature` goes into what a run is: a resume whose pixels would differ is refused.
What the fast decoders refuse Pillow decides, so that which images are whole does not depend on what is installed; but
only simplejpeg passes on what libjpeg says of a JPEG that is not, and without it none is taken.
"""

import base64
import hashlib
import io
import re

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.format import FormatError, center_crop_box
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

_WEBP_LOSSLESS = re.compile(rb"RIFF.{4}WEBPVP8L.{4}\x2f(.{4})", re.DOTALL)  # of nothing but the pixels
_FORMATS = ("JPEG", "PNG", "WEBP")  # others' decoders, and what they start (Ghostscript), never see the bytes
_FAST_COLOURS = {"RGB": {"YCbCr", "RGB"}, "L": {"Gray"}}  # whatever needs a conversion is Pillow's

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
    pixels = np.empty((size, size, {"RGB": 3, "L": 1}[mode]), dtype=np.uint8)
    decode_into(pixels, encoded, mode, crop=crop)
    return pixels.transpose(2, 0, 1)


def decode_into(out: npt.NDArray[np.uint8], encoded: bytes, mode: str, *, crop: bool = False) -> None:
    """Decode one image to `out`, (size, size, C) uint8, contiguous; mode is "RGB" or "L".

    `crop`: the image was taken as found, with a shorter side of `size`; its middle square is cut out, and a grey image
    becomes a colour one. Otherwise it must be of that size and mode: nothing is resized or converted here, for that was
    data_prep's work. Raises SampleError where it is something else, or cannot be decoded to its end; then `out` holds
    anything. Raises DataError for a JPEG where simplejpeg is missing.
    """
    is_jpeg = encoded.startswith(JPEG_MAGIC)
    fast = _decode_jpeg if is_jpeg else _decode_webp
    if fast(out, encoded, mode, crop=crop):
        return
    if is_jpeg and (fault := jpeg_fault(encoded)) is not None:
        raise SampleError(f"cannot be decoded ({fault})")
    _decode_by_pillow(out, encoded, mode, crop=crop)


def jpeg_signature() -> str:
    """Identifies the pixels that JPEGs are decoded to here: the same for two decoders that agree."""
    return hashlib.sha256(decode(_PROBE, 20, "RGB").tobytes()).hexdigest()[:16]


def _decode_webp(out: npt.NDArray[np.uint8], encoded: bytes, mode: str, *, crop: bool) -> bool:
    """Like `_decode_jpeg`, for lossless WebP; Pillow takes the way of animations, which copies each image thrice."""
    if webp is None or mode != "RGB" or (header := _WEBP_LOSSLESS.match(encoded)) is None:
        return False
    bits = int.from_bytes(header[1], "little")  # width - 1 and height - 1 of 14 bits each, whether there is an alpha
    if bits >> 28:
        return False
    left, top, right, bottom = _box((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, len(out), mode, crop=crop)
    try:
        out[:] = webp.WebPData.from_buffer(encoded).decode(webp.WebPColorMode.RGB)[top:bottom, left:right]
    except webp.WebPError:
        return False
    return True


def _decode_jpeg(out: npt.NDArray[np.uint8], encoded: bytes, mode: str, *, crop: bool) -> bool:
    """Like `decode_into`; False where it is a case for Pillow."""
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
            simplejpeg.decode_jpeg(encoded, wanted, buffer=out)  # no copy
        else:
            out[:] = simplejpeg.decode_jpeg(encoded, wanted)[top:bottom, left:right]
    except ValueError:  # simplejpeg's only one; it refuses stray bytes between segments, too
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
    except Exception as error:  # Pillow's readers raise whatever the bytes lead them to: struct.error, TypeError, ...
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
