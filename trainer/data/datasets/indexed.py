"""Random access to the samples of tar files, by an index of offsets."""

import bisect
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.format import CHANNELS, MEMBERS, UNLABELLED, crc32
from trainer.data.datasets.dataset import MEMBER_OF, Dataset, Shard, ShardFiles
from trainer.data.decode import decode_array, decode_into, decode_square, decode_text
from trainer.data.orders.permutation import mix
from trainer.errors import DataError, SampleError

_OPEN_SHARDS = 256
_HOLDOUT = np.uint64(0x686F6C646F7574)  # "holdout": distinguishes these hashes from others

Place = tuple[int, ...]  # of a member in its shard: offset, length, and crc32 where the index has it


@dataclass(frozen=True, kw_only=True)
class StoredImages:
    """How images are stored: side in pixels, mode, and whether they are cropped when they are decoded, see `decode`.

    sides: of second images in pixels, by their members' names; one that is not there has its own.
    """

    image_size: int
    mode: str
    crop: bool
    sides: Mapping[str, int] = field(default_factory=dict)


class IndexedDataset(Dataset):
    """Images by sample id, 0 <= id < len(self): ids are numbered through the shards, in the order of the index.

    Instances may be forked or pickled to loader processes: reads share no file position, and a pickled copy opens its
    own files. Subclasses implement `key`, `describe` and `split_keys`.

    where: the folder or URL, for messages; index: a .npy file (memory-mapped, so that all processes of a node share its
    pages) or an array; its columns are the image's "offset", "length" and, right behind them, perhaps "crc32"; "label";
    and for each further member the same by its name; fingerprint: identifies the samples and their numbering; cond:
    names of MEMBER_OF, what is read with each image; classes: names of the labels 0, 1, ..., or None.
    """

    def __init__(
        self,
        *,
        where: str,
        shards: Sequence[Shard],
        index: Path | npt.NDArray[np.void],
        stored: StoredImages,
        fingerprint: str,
        files: ShardFiles,
        cond: Sequence[str],
        classes: list[str] | None = None,
    ) -> None:
        self.where = where
        self.shards = list(shards)
        self.stored = stored
        self.image_size = stored.image_size
        self.fingerprint = fingerprint
        self.files = files
        self.bounds = np.cumsum([0, *(shard.samples for shard in shards)])
        self._ends: list[int] = self.bounds[1:].tolist()  # a list of int: faster than an array to search for one sample
        self._index_source = index
        self._index: npt.NDArray[np.void] | None = None
        columns = self._open_index().dtype.names or ()
        image = columns.index("offset")
        self._image_at = slice(image, image + (3 if "crc32" in columns else 2))
        self.cond = tuple(cond)
        self.classes = classes
        self._cond_at = {name: columns.index(MEMBER_OF[name]) for name in cond if name != "label"}
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def channels(self) -> int:
        """Number of channels: 3 for RGB, 1 for grey."""
        return CHANNELS[self.stored.mode]

    @property
    def index(self) -> npt.NDArray[np.void]:
        """(N,) structured array, one row per sample."""
        if self._index is None:
            self._index = self._open_index()
        return self._index

    def _open_index(self) -> npt.NDArray[np.void]:
        if isinstance(self._index_source, np.ndarray):
            return self._index_source
        return np.asarray(np.load(self._index_source, mmap_mode="r", allow_pickle=False))

    def decode_into(self, out: npt.NDArray[np.uint8], sample: int) -> None:
        """Implements `Dataset.decode_into`."""
        encoded = self.read(sample)
        try:
            decode_into(out, encoded, self.stored.mode, crop=self.stored.crop)
        except SampleError as error:
            raise SampleError(f"{self.describe(sample)}: {error}") from error

    def further(self, sample: int) -> dict[str, Any]:
        """Implements `Dataset.further`."""
        found: dict[str, Any] = {}
        for name in self.cond:
            try:
                found[name] = self._label(sample) if name == "label" else self._further(sample, name)
            except SampleError as error:
                raise SampleError(f"{self.describe(sample)}: {name}: {error}") from error
        return found

    def read(self, sample: int) -> bytes:
        """The encoded image.

        Raises SampleError where the bytes differ from those that were indexed, DataError where the shard is
        unavailable.
        """
        row: tuple[int, ...] = self.index[sample].item()  # plain integers: faster than a dictionary of them
        try:
            return self._verified(sample, row[self._image_at])
        except SampleError as error:
            raise SampleError(f"{self.describe(sample)}: {error}") from error

    def _label(self, sample: int) -> int:
        label = int(self.index[sample]["label"])
        if label == UNLABELLED:
            raise SampleError("the sample has none")
        return label

    def _further(self, sample: int, name: str) -> Any:
        place: Place = self.index[sample].item()[self._cond_at[name]]
        if not any(place):
            raise SampleError("the sample has none")
        data = self._verified(sample, place)
        member = MEMBER_OF[name]
        kind = MEMBERS[member]
        if kind == "image":
            return decode_square(data, self.stored.mode, self.stored.sides.get(member), crop=self.stored.crop)
        return decode_text(data) if kind == "text" else decode_array(data)

    def _verified(self, sample: int, place: Place) -> bytes:
        shard = bisect.bisect_right(self._ends, sample)
        found = self._read(shard, place)
        if _is_intact(place, found):
            return found
        if self.files.renew(self.shards[shard]):
            os.close(self._descriptors.pop(shard))
            found = self._read(shard, place)
        if not _is_intact(place, found):
            damage = "crc32 differs" if len(place) > 2 else "cut off"
            raise SampleError(f"damaged ({damage}); restore the shard or prepare it again")
        return found

    def split_keys(self) -> npt.NDArray[np.uint64]:
        """(N,) keys that identify samples independently of their location; the held-out split is a function of them."""
        raise NotImplementedError

    def is_held_out(self, fraction: float) -> npt.NDArray[np.bool_]:
        """(N,), true for about `fraction` x N samples, fraction in [0, 1): a function of each sample's key alone.

        A larger fraction holds out a superset. The result does not depend on seed, order or the other samples.
        """
        return mix(mix(self.split_keys() ^ _HOLDOUT)) < np.uint64(int(fraction * 2.0**64))

    def _read(self, shard: int, place: Place) -> bytes:
        try:
            return os.pread(self._descriptor(shard), place[1], place[0])
        except OSError as error:
            raise DataError(f"{self.shards[shard].url}: cannot be read ({error.strerror})") from error

    def _descriptor(self, shard: int) -> int:
        """An open descriptor of the shard; the least recently used one is closed when there are too many."""
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
        """Close files that a cache has evicted: their disk space is freed only when no process has them open."""
        for shard, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._descriptors.pop(shard))

    def close(self) -> None:
        """Close the files; they open again when needed."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        # Pickling would copy the memory-mapped content; descriptors are invalid in another process.
        return {**self.__dict__, "_index": None, "_descriptors": OrderedDict()}


def _is_intact(place: Place, data: bytes) -> bool:
    """Whether the bytes are those that were indexed, as far as the index has evidence."""
    return len(data) == place[1] and (len(place) == 2 or crc32(data) == place[2])
