"""Random access to the samples of a sharded dataset, each checked against the index."""

import bisect
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_prep.format import INDEX_DTYPE, INDEX_NAME, SOURCE_ENCODING, FormatError, load_manifest, sha256_of
from trainer.data.decode import decode_into
from trainer.errors import DataError, SampleError

_OPEN_SHARDS = 256
_SHA256 = re.compile(r"[0-9a-f]{64}")


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

    def label(self, sample: int) -> int:
        """The sample's class, or -1."""

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


class IndexedDataset:
    """Images by sample id, 0 <= id < len(self): ids follow the shards, and inside a shard the index.

    It may be forked or sent to loader processes: reads do not share a file position, and a copy that was sent opens its
    own files. A kind of dataset adds `describe`, `split_keys` and, where it knows more than the length, `is_intact`.

    where: the folder or URL, for messages; index: a .npy file (memory-mapped, so that all processes of a node share its
    pages) or an array, with columns "offset", "length" and "label"; crop: see `decode`; fingerprint: identifies the
    samples and their numbering.
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
        row = dict(zip(self.index.dtype.names or (), self.index[sample].item()))
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

    def is_intact(self, row: Mapping[str, int], encoded: bytes) -> bool:
        """Whether these are the bytes that the index was made from, as far as the index tells; row: the sample's."""
        return len(encoded) == row["length"]

    def label(self, sample: int) -> int:
        """The sample's class, or -1."""
        return int(self.index[sample]["label"])

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages: "shard-000003.tar: member 000006151.webp (sample 6150)"."""
        raise NotImplementedError

    def split_keys(self) -> npt.NDArray[np.uint64]:
        """(N,) what a sample is, wherever it lies: the held-out split is drawn by it."""
        raise NotImplementedError

    def _read(self, shard: int, row: Mapping[str, int]) -> bytes:
        try:
            return os.pread(self._descriptor(shard), row["length"], row["offset"])
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


class ShardedDataset(IndexedDataset):
    """The images that data_prep wrote.

    Opening checks the manifest, the index and, of shards that lie in `folder`, every size; reading checks each sample's
    crc32. `folder` holds manifest and index, and the shards too unless `origin` (a path or URL) says where they are.
    Raises DataError.
    """

    damage = "crc32 differs"

    def __init__(self, folder: Path, *, origin: str | None = None, files: ShardFiles | None = None) -> None:
        try:
            self.manifest = load_manifest(folder)
        except FormatError as error:
            raise DataError(str(error)) from error
        self.folder = folder
        where = origin or str(folder)
        for record in self.manifest.shards:
            if PurePosixPath(record.name).name != record.name or not _SHA256.fullmatch(record.sha256):
                raise DataError(f"{where}: the manifest names a shard {record.name!r} with sha256 {record.sha256!r}")
        super().__init__(
            where=where,
            shards=[
                Shard(
                    url=f"{where.rstrip('/')}/{record.name}",
                    samples=record.samples,
                    bytes=record.bytes,
                    digest=record.sha256,
                    verifiable=True,
                )
                for record in self.manifest.shards
            ],
            index=folder / INDEX_NAME,
            image_size=self.manifest.image_size,
            mode=self.manifest.mode,
            crop=self.manifest.encoding == SOURCE_ENCODING,
            fingerprint=self.manifest.fingerprint,
            files=files or InPlace(),
        )
        if origin is None:
            self._check_sizes()
        self._check_index()

    def is_intact(self, row: Mapping[str, int], encoded: bytes) -> bool:
        """See `IndexedDataset`: by crc32."""
        return super().is_intact(row, encoded) and zlib.crc32(encoded) == row["crc32"]

    def describe(self, sample: int) -> str:
        """See `IndexedDataset`."""
        member = f"{self.index[sample]['key']:09d}"
        if not self.crop:  # else each member has the extension of its own format
            member += f".{self.manifest.encoding}"
        return f"{self.shards[int(self.shards_of(sample))].url}: member {member} (sample {sample})"

    def split_keys(self) -> npt.NDArray[np.uint64]:
        """See `IndexedDataset`: by content, so that two copies of an image are never on both sides of a split."""
        return (self.index["crc32"].astype(np.uint64) << np.uint64(32)) | self.index["length"]

    def _check_sizes(self) -> None:
        for shard in self.shards:
            path = Path(shard.url)
            if not path.is_file():
                raise DataError(f"{path}: missing; the manifest lists {len(self.shards)} shards")
            if path.stat().st_size != shard.bytes:
                raise DataError(f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}")
        listed = {shard.url for shard in self.shards}
        extra = sorted(str(path) for path in self.folder.glob("shard-*.tar") if str(path) not in listed)
        if extra:
            raise DataError(f"{extra[0]}: not in the manifest; a folder holds one dataset, so prepare it again")

    def _check_index(self) -> None:
        path = self.folder / INDEX_NAME
        if not path.is_file():
            raise DataError(f"{path}: missing")
        if sha256_of(path) != self.manifest.index_sha256:
            raise DataError(f"{path}: sha256 differs from the manifest's; the file was changed or is stale")
        try:
            self.index  # noqa: B018 - it is read here for the first time
        except ValueError as error:
            raise DataError(f"{path}: not an index ({error}); prepare the dataset again") from error
        if self.index.dtype != INDEX_DTYPE or self.index.shape != (self.manifest.samples,):
            raise DataError(f"{path}: holds {self.index.shape} rows, the manifest says {self.manifest.samples}")
        if len(self) != self.manifest.samples or not len(self):
            raise DataError(
                f"{self.where}: {len(self)} samples in the shards, the manifest says {self.manifest.samples}"
            )
        starts, ends = self.bounds[:-1], self.bounds[1:]
        holding = ends > starts
        first, last = self.index["shard"][starts[holding]], self.index["shard"][ends[holding] - 1]
        if not ((first == np.flatnonzero(holding)) & (last == np.flatnonzero(holding))).all():
            raise DataError(f"{path}: its rows do not follow the manifest's shards; prepare the dataset again")
