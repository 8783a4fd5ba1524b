"""Random access to the samples of a sharded dataset, each checked against the index."""

import os
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from data_prep.format import INDEX_DTYPE, INDEX_NAME, FormatError, check_files, load_manifest
from trainer.errors import DataError

_OPEN_SHARDS = 256


class ShardedDataset:
    """The images of one data_prep folder by sample id, 0 <= id < len(self).

    Opening checks the manifest, every shard's size and the index; reading checks each sample's crc32. It may be forked
    or sent to loader processes: reads do not share a file position, and a copy that was sent opens its own files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = load_manifest(folder)
            check_files(folder, self.manifest)
        except FormatError as error:
            raise DataError(str(error)) from error
        self._index: np.ndarray | None = None
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        if self.index.dtype != INDEX_DTYPE or self.index.shape != (self.manifest.samples,):
            raise DataError(f"{folder / INDEX_NAME}: holds {self.index.shape} rows, the manifest says {len(self)}")

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def index(self) -> np.ndarray:
        """(N,) INDEX_DTYPE, memory-mapped: the pages are shared by all processes of a node."""
        if self._index is None:
            self._index = np.load(self.folder / INDEX_NAME, mmap_mode="r", allow_pickle=False)
        return self._index

    def label(self, sample: int) -> int:
        """The sample's class, or -1."""
        return int(self.index[sample]["label"])

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages: "shard-000003.tar: member 000006151.webp (sample 6150)"."""
        row = self.index[sample]
        shard = self.manifest.shards[row["shard"]].name
        return f"{self.folder / shard}: member {row['key']:09d}.{self.manifest.encoding} (sample {sample})"

    def read(self, sample: int) -> bytes:
        """The encoded image.

        Raises DataError where the bytes are not the ones that the index was made from.
        """
        row = self.index[sample]
        length = int(row["length"])
        encoded = os.pread(self._descriptor(int(row["shard"])), length, int(row["offset"]))
        if len(encoded) != length or zlib.crc32(encoded) != row["crc32"]:
            raise DataError(f"{self.describe(sample)}: damaged (crc32 differs); restore the shard or prepare it again")
        return encoded

    def _descriptor(self, shard: int) -> int:
        """An open file for the shard; the least recently used one is closed when there are too many."""
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        path = self.folder / self.manifest.shards[shard].name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror})") from error
        self._descriptors[shard] = descriptor
        if len(self._descriptors) > _OPEN_SHARDS:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        """Close the files; they open again when needed."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        # A memory map would be pickled as its content and a descriptor means nothing in another process.
        return {"folder": self.folder, "manifest": self.manifest, "_index": None, "_descriptors": OrderedDict()}
