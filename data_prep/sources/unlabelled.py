"""A wrapper for any source that drops its labels, captions and what else goes with images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import ClassVar, Self

from PIL import Image

from data_prep.format import UNLABELLED
from data_prep.sources.base import Source, fingerprint_of
from data_prep.sources.members import ImagesAlone


@dataclass(frozen=True, eq=False)
class UnlabelledSource(ImagesAlone):
    """The images of `source` alone; its fingerprint differs from that of `source`."""

    source: Source
    classes: ClassVar[Sequence[str]] = ()

    kind = property(attrgetter("source.kind"))
    names = property(attrgetter("source.names"))
    natural_mode = property(attrgetter("source.natural_mode"))
    notice = property(attrgetter("source.notice"))
    left_out = property(attrgetter("source.left_out"))

    @property
    def fingerprint(self) -> str:  # noqa: D102 - see Source
        return fingerprint_of([[self.source.fingerprint, "without labels"]])

    def label(self, i: int) -> int:  # noqa: ARG002, D102 - see Source
        return UNLABELLED

    def read(self, i: int) -> bytes | Image.Image:  # noqa: D102 - see Source
        return self.source.read(i)

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        return replace(self, source=self.source.part(start, stop))
