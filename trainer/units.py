"""Quantities as people write them in a configuration: "800k steps", "51.2M images", "200 GB", "10 minutes"."""

import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6}
_MOST_COUNTED = 10**12  # times the largest global batch it is still an int64, which positions are
_SPAN = re.compile(r"\s*([\d_]+(?:\.\d+)?)\s*([kM]?)\s*(steps?|images?)\s*")


@dataclass(frozen=True)
class Span:
    """A stretch of training, counted in optimizer steps or in images: "800k steps", "51.2M images"."""

    count: int
    unit: Literal["steps", "images"]

    @classmethod
    def parse(cls, text: Any) -> "Span":
        """Read "5000 steps", "2.4M steps" or "51_200 images"; raises ValueError for anything else."""
        if isinstance(text, Span):
            return text
        match = _SPAN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError('a span of training is written like "5000 steps", "2.4M steps" or "51.2M images"')
        number, suffix, unit = match.groups()
        count = Decimal(number.replace("_", "")) * _SUFFIXES[suffix]
        if count > _MOST_COUNTED:
            raise ValueError(f"should be at most {_MOST_COUNTED:,} {unit}")
        if count != int(count):
            raise ValueError(f"{count} {unit} is no whole number of {unit}")
        return cls(int(count), "steps" if unit.startswith("step") else "images")

    def images(self, global_batch: int) -> int:
        """The span in images, whatever it was written in."""
        return self.count * global_batch if self.unit == "steps" else self.count

    def steps(self, global_batch: int) -> int:
        """The span in whole optimizer steps, rounded up."""
        return -(-self.images(global_batch) // global_batch)

    def is_due(self, position: int, global_batch: int) -> bool:
        """Whether the step that ended at `position` (images consumed) completed one more of this span; 0 is never."""
        images = self.images(global_batch)
        return images > 0 and position // images > (position - global_batch) // images

    def __str__(self) -> str:
        return f"{self.count} {self.unit}"


SpanField = Annotated[Span, BeforeValidator(Span.parse), PlainSerializer(str)]


_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"\s*([\d_]+(?:\.\d+)?)\s*([kMGT]?B)\s*")


def parse_size(text: Any) -> int:
    """Read "200 GB" or a number of bytes; raises ValueError for anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError('a size is written like "200 GB", in B, kB, MB, GB or TB')
    return int(Decimal(match[1].replace("_", "")) * _BYTES[match[2]])


def as_size(count: float) -> str:
    """Bytes for people: "1.50 GiB", "12.3 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


SizeField = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=10**18)]


_TIME_UNITS = {"second": 1, "minute": 60, "hour": 3600}
_TIME = re.compile(r"\s*([\d_]+(?:\.\d+)?)\s*(second|minute|hour)s?\s*")


def parse_seconds(text: Any) -> float:
    """Read "90 seconds" or "10 minutes" as seconds; raises ValueError for anything else."""
    match = _TIME.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError('a time is written like "10 minutes", in seconds, minutes or hours')
    return float(Decimal(match[1].replace("_", "")) * _TIME_UNITS[match[2]])


SecondsField = Annotated[
    float,
    BeforeValidator(parse_seconds),
    Field(le=10**8),
    PlainSerializer(lambda seconds: f"{Decimal(str(seconds)):f} seconds"),
]


def in_words(seconds: float) -> str:
    """A duration for people: "3 d 4 h", "12 min", "8 s"."""
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    whole = round(seconds)
    for (size, name), (smaller, smaller_name) in pairwise(units):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s"
