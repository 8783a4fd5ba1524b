"""The interface of datasets, as used by the stream, and how their files are opened."""

import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError

# By the name that a network takes it by (`data.cond`): the member of a sample, as data_prep.format.MEMBERS names it.
MEMBER_OF = {"label": "cls", "caption": "txt", "array": "npy", "low_res": "low", "source": "source"}
SECOND_IMAGES = ("low_res", "source")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a dataset: its location (a path or a URL), size and digest."""

    url: str
    samples: int
    bytes: int
    digest: str  # sha256 of the content; where that is unknown, a hash of name, size and time
    verifiable: bool  # whether the digest is that of the content


class ShardFiles(Protocol):
    """How shards are opened: in place, or through a cache on this node."""

    def open(self, shard: Shard) -> int:
        """A descriptor for reading. Raises DataError where there is no such file."""

    def renew(self, shard: Shard) -> bool:
        """Called after read data turned out to be damaged: returns whether to open the shard and read again."""


class Dataset(Protocol):
    """Samples by id, 0 <= id < len(self), in numbered shards: the interface used by the stream.

    bounds: the first id of each shard, then len(self); cond: names of MEMBER_OF, what is read with each image.
    """

    where: str
    shards: list[Shard]
    bounds: npt.NDArray[np.int64]
    image_size: int
    fingerprint: str
    cond: tuple[str, ...]

    def __len__(self) -> int: ...

    @property
    def channels(self) -> int:
        """Number of channels: 3 for RGB, 1 for grey."""

    def shards_of(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The shards, by position in `shards`, that hold these samples."""
        return np.searchsorted(self.bounds, samples, side="right") - 1

    def decode_into(self, out: npt.NDArray[np.uint8], sample: int) -> None:
        """Decode an image to `out`, (image_size, image_size, C) uint8, contiguous.

        Raises SampleError that names shard and member, or DataError where the shard is unavailable.
        """

    def further(self, sample: int) -> dict[str, Any]:
        """What `cond` names: label: int; caption: str; low_res, source: (h, w, C) uint8; array: a numpy array.

        Raises SampleError that names shard and member where the sample has no such member or it is damaged, or
        DataError where the shard is unavailable.
        """

    def key(self, sample: int) -> str:
        """Key of a sample in its tar, or what identifies it there."""

    def describe(self, sample: int) -> str:
        """Location of a sample, for messages."""

    def close(self) -> None:
        """Close the files; they open again when needed."""


class InPlace:
    """Shards on a file system of this node, read in place; implements `ShardFiles`."""

    def open(self, shard: Shard) -> int:
        """Open the file. Raises DataError where it cannot be opened."""
        try:
            return os.open(shard.url, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{shard.url}: cannot be opened ({error.strerror})") from error

    def renew(self, shard: Shard) -> bool:  # noqa: ARG002 - there is no other copy
        """Returns False: there is no other copy."""
        return False
