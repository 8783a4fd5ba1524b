"""What the stream needs to know of a dataset, and how the files of one are opened."""

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a dataset: where it lies (a path or a URL) and what is known of it beforehand."""

    url: str
    samples: int
    bytes: int
    digest: str  # of its content (sha256), or of its name, size and time where nobody has promised a content
    verifiable: bool  # whether the digest is the content's


class ShardFiles(Protocol):
    """How shards are opened: where they lie, or through a cache on this node."""

    def open(self, shard: Shard) -> int:
        """A descriptor for reading. Raises DataError where there is no such file."""

    def renew(self, shard: Shard) -> bool:
        """What was read is not what was promised: whether it is worth opening and reading again."""


class Dataset(Protocol):
    """Images by sample id, 0 <= id < len(self), in numbered shards: what the stream needs to know of a dataset."""

    where: str
    shards: list[Shard]
    image_size: int
    fingerprint: str

    def __len__(self) -> int: ...

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for grey."""

    def shards_of(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The shards, by position in `shards`, that hold these samples."""

    def decode_into(self, out: npt.NDArray[np.uint8], sample: int) -> None:
        """Decode an image to `out`, (image_size, image_size, C) uint8, contiguous.

        Raises SampleError that names shard and member, or DataError where the shard cannot be had at all.
        """

    def labels(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The samples' classes, or -1; (B,)."""

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages."""

    def close(self) -> None:
        """Close the files; they open again when needed."""


class InPlace:
    """Shards on a file system of this node, read where they lie."""

    def open(self, shard: Shard) -> int:
        """See `ShardFiles`."""
        try:
            return os.open(shard.url, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{shard.url}: cannot be opened ({error.strerror})") from error

    def renew(self, shard: Shard) -> bool:  # noqa: ARG002 - there is no other copy
        """See `ShardFiles`."""
        return False
