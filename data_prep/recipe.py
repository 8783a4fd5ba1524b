"""The options that decide the bytes of a dataset."""

from dataclasses import dataclass
from typing import Literal, get_args

from data_prep.errors import InputError

Resample = Literal["lanczos", "bicubic", "box"]
Encoding = Literal["webp", "png", "jpeg"]
Mode = Literal["RGB", "L"]

RESAMPLES: tuple[Resample, ...] = get_args(Resample)
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Same source, same recipe and same Pillow give the same bytes, on any number of workers.

    `image_size` is the side in pixels, at least 1; `shard_samples` the number of sources cut into one shard, at
    least 1. Raises InputError otherwise.
    """

    image_size: int = 256
    resample: Resample = "lanczos"
    encoding: Encoding = "webp"
    mode: Mode = "RGB"
    shard_samples: int = 2048
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise InputError(f"--size {self.image_size}: must be at least 1")
        if self.shard_samples < 1:
            raise InputError(f"--shard-samples {self.shard_samples}: must be at least 1")
