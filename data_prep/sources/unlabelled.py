"""A wrapper for any source that drops its labels, captions and what else goes with images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from PIL import Image

from data_prep.format import UNLABELLED
from data_prep.recipe import Mode
from data_prep.sources.base import Source, fingerprint_of
from data_prep.sources.members import ImagesAlone


@dataclass(frozen=True, eq=False)
class UnlabelledSource(ImagesAlone):
    """The images of `source` alone; its fingerprint differs from that of `source`."""

    source: Source
    classes: ClassVar[Sequence[str]] = ()

    @property
    def kind(self) -> str:  # noqa: D102 - see Source
        return self.source.kind

    @property
    def names(self) -> Sequence[str]:  # noqa: D102 - see Source
        return self.source.names

    @property
    def fingerprint(self) -> str:  # noqa: D102 - see Source
        return fingerprint_of([[self.source.fingerprint, "without labels"]])

    @property
    def natural_mode(self) -> Mode:  # noqa: D102 - see Source
        return self.source.natural_mode

    @property
    def notice(self) -> str | None:  # noqa: D102 - see Source
        return self.source.notice

    @property
    def left_out(self) -> Mapping[str, int]:  # noqa: D102 - see Source
        return self.source.left_out

    def label(self, i: int) -> int:  # noqa: ARG002, D102 - see Source
        return UNLABELLED

    def read(self, i: int) -> bytes | Image.Image:  # noqa: D102 - see Source
        return self.source.read(i)

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        return replace(self, source=self.source.part(start, stop))
