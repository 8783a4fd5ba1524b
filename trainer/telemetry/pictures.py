"""Samples as pictures: quantisation, grids, PNG files."""

import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange, repeat
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def from_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Scale pixels from 0..255 to [-1, 1], float32 (Ho et al. 2020, section 3.3)."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Quantise images from [-1, 1] to 0..255: the inverse of `from_uint8`, rounded."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


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


def save_png(path: Path, pixels: Pixels) -> None:
    """Write an (H, W, C) picture atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(fresh, format="png")
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
