"""Random access to the samples of tar files by an index of where each one lies."""

import bisect
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.dataset import Shard, ShardFiles
from trainer.data.decode import decode_into
from trainer.errors import DataError, SampleError

_OPEN_SHARDS = 256

Row = tuple[int, ...]  # of an index, in the order of its columns


class IndexedDataset:
    """Images by sample id, 0 <= id < len(self): ids follow the shards, and inside a shard the index.

    It may be forked or sent to loader processes: reads do not share a file position, and a copy that was sent opens its
    own files. A kind of dataset adds `describe`, `split_keys` and, where it knows more than the length, `is_intact`.

    where: the folder or URL, for messages; index: a .npy file (memory-mapped, so that all processes of a node share its
    pages) or an array, with `columns`, "offset", "length" and "label" among them; crop: see `decode`; fingerprint:
    identifies the samples and their numbering.
    """

    damage = "cut off"  # what is wrong where `is_intact` says no

    def __init__(
        self,
        *,
        where: str,
        shards: Sequence[Shard],
        index: Path | npt.NDArray[np.void],
        image_size: int,
        mode: str,
        crop: bool,
        fingerprint: str,
        files: ShardFiles,
        columns: Sequence[str],
    ) -> None:
        self.where = where
        self.shards = list(shards)
        self.image_size = image_size
        self.mode = mode
        self.crop = crop
        self.fingerprint = fingerprint
        self.files = files
        self.bounds = np.cumsum([0, *(shard.samples for shard in shards)])
        self._ends: list[int] = self.bounds[1:].tolist()  # plain integers: quick to search for one sample
        self._index_source = index
        self._index: npt.NDArray[np.void] | None = None
        self._offset_at, self._length_at = (columns.index(name) for name in ("offset", "length"))
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for grey."""
        return {"RGB": 3, "L": 1}[self.mode]

    @property
    def index(self) -> npt.NDArray[np.void]:
        """(N,) structured array, one row a sample."""
        if isinstance(self._index_source, np.ndarray):
            return self._index_source
        if self._index is None:
            self._index = np.asarray(np.load(self._index_source, mmap_mode="r", allow_pickle=False))
        return self._index

    def shards_of(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The shards, by position in `shards`, that hold these samples."""
        return np.searchsorted(self.bounds, samples, side="right") - 1

    def image(self, sample: int) -> npt.NDArray[np.uint8]:
        """The decoded image, (C, image_size, image_size) uint8; see `decode_into`."""
        pixels = np.empty((self.image_size, self.image_size, self.channels), dtype=np.uint8)
        self.decode_into(pixels, sample)
        return pixels.transpose(2, 0, 1)

    def decode_into(self, out: npt.NDArray[np.uint8], sample: int) -> None:
        """See `Dataset`."""
        encoded = self.read(sample)
        try:
            decode_into(out, encoded, self.mode, crop=self.crop)
        except SampleError as error:
            raise SampleError(f"{self.describe(sample)}: {error}") from error

    def read(self, sample: int) -> bytes:
        """The encoded image.

        Raises SampleError where the bytes are not the ones that the index was made from, DataError where the shard
        cannot be had at all.
        """
        row: Row = self.index[sample].item()  # plain integers, in less time than a dictionary of them takes
        shard = bisect.bisect_right(self._ends, sample)
        encoded = self._read(shard, row)
        if self.is_intact(row, encoded):
            return encoded
        if self.files.renew(self.shards[shard]):
            os.close(self._descriptors.pop(shard))
            encoded = self._read(shard, row)
        if not self.is_intact(row, encoded):
            raise SampleError(
                f"{self.describe(sample)}: damaged ({self.damage}); restore the shard or prepare it again"
            )
        return encoded

    def is_intact(self, row: Row, encoded: bytes) -> bool:
        """Whether these are the bytes that the index was made from, as far as the index tells; row: the sample's."""
        return len(encoded) == row[self._length_at]

    def labels(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """See `Dataset`."""
        return self.index["label"][np.asarray(samples)].astype(np.int64)

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages: "shard-000003.tar: member 000006151.webp (sample 6150)"."""
        raise NotImplementedError

    def split_keys(self) -> npt.NDArray[np.uint64]:
        """(N,) what a sample is, wherever it lies: the held-out split is drawn by it."""
        raise NotImplementedError

    def _read(self, shard: int, row: Row) -> bytes:
        try:
            return os.pread(self._descriptor(shard), row[self._length_at], row[self._offset_at])
        except OSError as error:
            raise DataError(f"{self.shards[shard].url}: cannot be read ({error.strerror})") from error

    def _descriptor(self, shard: int) -> int:
        """An open file for the shard; the least recently used one is closed when there are too many."""
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        self._close_deleted()
        descriptor = self.files.open(self.shards[shard])
        self._descriptors[shard] = descriptor
        if len(self._descriptors) > _OPEN_SHARDS:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def _close_deleted(self) -> None:
        """A file that a cache has deleted takes its space until nobody has it open any more."""
        for shard, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._descriptors.pop(shard))

    def close(self) -> None:
        """Close the files; they open again when needed."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as its content and a descriptor means nothing in another process.
        return {**self.__dict__, "_index": None, "_descriptors": OrderedDict()}
