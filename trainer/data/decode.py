"""Encoded bytes to pixels."""

import io

import numpy as np
import numpy.typing as npt
from einops import rearrange
from PIL import Image

from trainer.errors import DataError


def decode(encoded: bytes, size: int, mode: str) -> npt.NDArray[np.uint8]:
    """Decode one image to (C, size, size) uint8; mode is Pillow's "RGB" or "L".

    Raises DataError where it cannot be decoded or has another size or mode. Nothing is resized or converted here:
    that was data_prep's work, and a difference means that the shards are not what the manifest says.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot be decoded ({error})") from error
    if image.size != (size, size) or image.mode not in (mode, "RGB" if mode == "L" else mode):
        raise DataError(f"is {image.mode} {image.width}x{image.height}, the manifest says {mode} {size}x{size}")
    pixels = np.asarray(image.convert(mode) if image.mode != mode else image)
    return rearrange(pixels, "h w c -> c h w" if mode == "RGB" else "h w -> 1 h w")
