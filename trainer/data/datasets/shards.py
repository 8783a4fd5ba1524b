"""Datasets written by data_prep: manifest and index are checked when opened, a crc32 when an image is read."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from data_prep.format import (
    INDEX_DTYPE,
    INDEX_NAME,
    SOURCE_ENCODING,
    FormatError,
    index_dtype,
    load_manifest,
    sha256_of,
)
from trainer.data.datasets.dataset import MEMBER_OF, InPlace, Shard, ShardFiles
from trainer.data.datasets.indexed import IndexedDataset
from trainer.errors import ConfigError, DataError

_KEY_AT = list(INDEX_DTYPE.names or ()).index("key")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ShardedDataset(IndexedDataset):
    """A dataset written by data_prep.

    Opening checks the manifest, the index and the sizes of shards in `folder`; reading checks each sample's crc32.
    `folder` holds manifest and index, and also the shards unless `origin` (a path or URL) is their location. Raises
    DataError, and ConfigError where no sample has what `cond` names.
    """

    def __init__(
        self,
        folder: Path,
        *,
        origin: str | None = None,
        files: ShardFiles | None = None,
        cond: Sequence[str] = (),
    ) -> None:
        try:
            self.manifest = load_manifest(folder)
        except FormatError as error:
            raise DataError(str(error)) from error
        self.folder = folder
        where = origin or str(folder)
        for record in self.manifest.shards:
            if PurePosixPath(record.name).name != record.name or not _SHA256.fullmatch(record.sha256):
                raise DataError(f"{where}: the manifest names a shard {record.name!r} with sha256 {record.sha256!r}")
        for name in cond:
            if not (self.manifest.classes if name == "label" else MEMBER_OF[name] in self.manifest.members):
                raise ConfigError(f"data.cond = {list(cond)}: no sample in {where} has a {name}")
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
            dtype=index_dtype(self.manifest.members),
            cond=cond,
            sides=self.manifest.members,
            classes=self.manifest.classes,
        )
        if origin is None:
            self._check_sizes()
        self._check_index()

    @override
    def key(self, sample: int) -> str:
        return f"{self.index[sample].item()[_KEY_AT]:09d}"

    @override
    def describe(self, sample: int) -> str:
        member = self.key(sample)
        if not self.crop:  # with `crop`, members keep the extension of their format
            member += f".{self.manifest.encoding}"
        return f"{self.shards[int(self.shards_of(sample))].url}: member {member} (sample {sample})"

    @override
    def split_keys(self) -> npt.NDArray[np.uint64]:
        """Hashes of the content, so that copies of an image are on the same side of the held-out split."""
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
            self.index  # noqa: B018 - loads and checks the index
        except ValueError as error:
            raise DataError(f"{path}: not an index ({error}); prepare the dataset again") from error
        if self.index.dtype != index_dtype(self.manifest.members) or self.index.shape != (self.manifest.samples,):
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
