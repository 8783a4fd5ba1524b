"""A base for sources that know where each of their images is, and what goes with it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.arrays import image_of_array
from data_prep.recipe import Mode
from data_prep.sources.members import Further, Place


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedSource(Generic[Place]):
    """Image `i` is at `places[i]`, and what goes with it at the places in `beside`; subclasses implement `_content`.

    The fields are those of `Source`; `labels` has the label of each image.
    """

    names: Sequence[str]
    places: Sequence[Place]
    labels: Sequence[int]
    classes: Sequence[str]
    fingerprint: str
    further_fingerprint: str = ""
    notice: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    beside: Further[Place] = field(default_factory=Further)
    natural_mode: ClassVar[Mode] = "RGB"

    @property
    def members(self) -> Sequence[str]:  # noqa: D102 - see Source
        return self.beside.members

    def label(self, i: int) -> int:  # noqa: D102 - see Source
        return self.labels[i]

    def read(self, i: int) -> bytes | Image.Image:  # noqa: D102 - see Source
        return self._content(self.places[i])

    def further(self, i: int) -> dict[str, bytes]:  # noqa: D102 - see Source
        return self.beside.read(i, self._content)

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        return replace(
            self,
            names=self.names[start:stop],
            places=self.places[start:stop],
            labels=self.labels[start:stop],
            beside=self.beside.part(start, stop),
            notice=None,
        )

    def _content(self, place: Place) -> bytes:
        """The bytes of a file. Raises as `Source.read`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelsSource(PlacedSource[npt.NDArray[np.uint8]]):
    """Images held in memory: `places` are their pixels, see `image_of_array`."""

    def read(self, i: int) -> Image.Image:  # noqa: D102 - see Source
        return image_of_array(self.places[i])


def fingerprint_of_pixels(pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer]) -> str:
    """Hex sha256 of all pixels and labels."""
    return hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
