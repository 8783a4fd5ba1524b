"""Pixels scaled to [-1, 1] and back, and images read by their ids."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange

from trainer.data.datasets.dataset import Dataset
from trainer.errors import SampleError

Pixels = npt.NDArray[np.uint8]
"""Images as they are stored and shown: 0..255."""


def from_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Scale pixels from 0..255 to [-1, 1], float32 (Ho et al. 2020, section 3.3)."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Quantise images from [-1, 1] to 0..255: the inverse of `from_uint8`, rounded."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def read_images(
    dataset: Dataset, ids: Iterable[int], *, skip_damaged: bool = False
) -> tuple[torch.Tensor, list[dict[str, Any]], list[int]]:
    """Images (B, C, H, W) uint8, what `dataset.cond` names of each, and their ids.

    Raises DataError with the name of a damaged sample, which `skip_damaged` leaves out instead.
    """
    asked = list(ids)
    pixels = np.empty((len(asked), dataset.image_size, dataset.image_size, dataset.channels), dtype=np.uint8)
    further, kept = list[dict[str, Any]](), list[int]()
    for sample in asked:
        try:
            dataset.decode_into(pixels[len(kept)], sample)
            further.append(dataset.further(sample))
        except SampleError:
            if not skip_damaged:
                raise
        else:
            kept.append(sample)
    return rearrange(torch.from_numpy(pixels[: len(kept)]), "b h w c -> b c h w"), further, kept
