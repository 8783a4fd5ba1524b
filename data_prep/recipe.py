"""The options that determine the bytes of a dataset."""

from dataclasses import dataclass
from typing import Literal, get_args

from data_prep.errors import InputError

Transform = Literal["ddpm", "adm", "edm", "area", "source"]
Encoding = Literal["webp", "png", "jpeg"]
Mode = Literal["RGB", "L"]

TRANSFORMS: tuple[Transform, ...] = get_args(Transform)
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The same source, recipe and version of Pillow result in the same bytes, for any number of workers.

    `image_size` is the side in pixels, at least 1; `shard_samples` the number of sources per shard, at least 1. Under
    the transform "source", `encoding` applies to images whose bytes cannot be kept, and must be lossless. Raises
    InputError for invalid values.
    """

    image_size: int = 256
    transform: Transform = "ddpm"
    encoding: Encoding = "webp"
    mode: Mode = "RGB"
    shard_samples: int = 2048
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise InputError(f"--size {self.image_size}: must be at least 1")
        if self.shard_samples < 1:
            raise InputError(f"--shard-samples {self.shard_samples}: must be at least 1")
        if self.keeps_bytes and self.encoding == "jpeg":
            raise InputError(
                "--format jpeg: --transform source must stay exact; give webp or png for the images it makes"
            )

    @property
    def keeps_bytes(self) -> bool:
        """Whether images that have the right size already are stored unchanged."""
        return self.transform == "source"
