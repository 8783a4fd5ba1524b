"""Arrays in `.npy` files, and images stored as pixel arrays, also in record formats."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format
from PIL import Image

from data_prep.errors import Reject

NPY_MAGIC = b"\x93NUMPY"


def image_of_npy(data: bytes) -> Image.Image:
    """The image in a `.npy` file: uint8 of shape (H, W), (H, W, C), (C, H, W) or (1, C, H, W), C = 1 or 3.

    Pickles are not loaded. Raises Reject for anything else.
    """
    stream = io.BytesIO(data)
    try:
        version = npy_format.read_magic(stream)
        read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, column_major, dtype = read_header(stream)
    except Exception as error:  # the header is an untrusted Python literal
        raise Reject("truncated or corrupt", f".npy header: {error}") from error
    if dtype != np.uint8:
        raise Reject("unsupported pixels", f".npy of {dtype}; 8-bit unsigned integers are read")
    body = data[stream.tell() :]
    if len(body) != np.prod(shape, dtype=object):
        raise Reject("truncated or corrupt", f".npy of shape {shape} in {len(body)} bytes")
    pixels = np.frombuffer(body, np.uint8).reshape(shape, order="F" if column_major else "C")
    return image_of_array(pixels)


def array_of_npy(data: bytes) -> npt.NDArray[Any]:
    """The array of numbers in a `.npy` file, of any shape. Pickles are not loaded.

    Raises ValueError for anything else, in one line.
    """
    try:
        found: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        kind = found.dtype.kind
    except Exception as error:  # the header is an untrusted Python literal
        raise ValueError(" ".join(str(error).split())) from error
    if kind not in "biuf":
        raise ValueError(f"its type is {found.dtype}")
    return found


def image_of_array(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """uint8 pixels of shape (H, W), (H, W, C), (C, H, W) or (1, C, H, W) with C = 1 or 3 as an image.

    Raises Reject for other shapes, and where the first and the last axis could both be the channels.
    """
    found = pixels.shape
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 3:
        pixels = _channels_last(pixels)
        if pixels.shape[2] == 1:
            pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or not pixels.size:
        raise Reject(
            "unsupported pixels", f"array of shape {found}; (H, W, C) or (C, H, W) with 1 or 3 channels is read"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _channels_last(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    first, last = (pixels.shape[axis] in (1, 3) for axis in (0, 2))
    if first == last:
        raise Reject(
            "unsupported pixels", f"array of shape {pixels.shape}; which of its axes are the channels is not clear"
        )
    return pixels.transpose(1, 2, 0) if first else pixels
