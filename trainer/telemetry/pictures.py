"""Samples as pictures: grids, PNG files."""

import io
import math
from pathlib import Path

import numpy as np
from einops import rearrange, repeat
from PIL import Image

from trainer.data.images import Pixels
from trainer.telemetry.files import write_whole


def grid(images: Pixels, *, shortest_side: int = 256) -> Pixels:
    """`tile` (N, C, H, W) images in a grid as close to a square as N allows."""
    return tile(images, columns=math.ceil(math.sqrt(len(images))), shortest_side=shortest_side)


def tile(images: Pixels, *, columns: int, shortest_side: int = 256) -> Pixels:
    """Arrange (N, C, H, W) images in rows of `columns`, with a thin border.

    Returns (H', W', 3). Small images are magnified by an integer factor.
    """
    count, _, height, _ = images.shape
    rows = math.ceil(count / columns)
    scale = max(1, math.ceil(shortest_side / (rows * height)))
    magnified = repeat(images, "n c h w -> n c (h a) (w b)", a=scale, b=scale)
    padding = ((0, rows * columns - count), (0, 0), (1, 1), (1, 1))
    tiles = np.pad(magnified, padding, constant_values=255)
    picture = rearrange(tiles, "(r k) c h w -> (r h) (k w) c", r=rows)
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))


def as_png(pixels: Pixels) -> bytes:
    """An (H, W, C) picture as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(content, format="png")
    return content.getvalue()


def save_png(path: Path, pixels: Pixels) -> None:
    """Write an (H, W, C) picture atomically, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_png(pixels), durable=False)
