"""Datasets written by data_prep: manifest and index are checked when opened, a crc32 when an image is read."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from data_prep.format import INDEX_DTYPE, INDEX_NAME, FormatError, Manifest, check_shards, checked_index, load_manifest
from trainer.data.datasets.dataset import MEMBER_OF, InPlace, Shard, ShardFiles
from trainer.data.datasets.indexed import IndexedDataset, StoredImages
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
        where = origin or str(folder)
        try:
            self.manifest = _checked_manifest(folder, where, cond, in_place=origin is None)
        except FormatError as error:
            raise DataError(str(error)) from error
        self.folder = folder
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
            stored=StoredImages(
                image_size=self.manifest.image_size,
                mode=self.manifest.mode,
                crop=self.manifest.crops,
                sides=self.manifest.members,
            ),
            fingerprint=self.manifest.fingerprint,
            files=files or InPlace(),
            cond=cond,
            classes=self.manifest.classes,
        )

    @override
    def key(self, sample: int) -> str:
        return f"{self.index[sample].item()[_KEY_AT]:09d}"

    @override
    def describe(self, sample: int) -> str:
        member = self.key(sample)
        if not self.manifest.crops:  # otherwise members keep the extension of their format
            member += f".{self.manifest.encoding}"
        return f"{self.shards[int(self.shards_of(sample))].url}: member {member} (sample {sample})"

    @override
    def split_keys(self) -> npt.NDArray[np.uint64]:
        """Hashes of the content, so that copies of an image are on the same side of the held-out split."""
        return (self.index["crc32"].astype(np.uint64) << np.uint64(32)) | self.index["length"]


def _checked_manifest(folder: Path, where: str, cond: Sequence[str], *, in_place: bool) -> Manifest:
    """The manifest of a dataset whose index, and shards where they are `in_place`, are as it says.

    Raises FormatError where they are not, and ConfigError where no sample has what `cond` names.
    """
    manifest = load_manifest(folder)
    for record in manifest.shards:
        if PurePosixPath(record.name).name != record.name or not _SHA256.fullmatch(record.sha256):
            raise FormatError(f"{where}: the manifest names a shard {record.name!r} with sha256 {record.sha256!r}")
    for name in cond:
        if not (manifest.classes if name == "label" else MEMBER_OF[name] in manifest.members):
            raise ConfigError(f"data.cond = {list(cond)}: no sample in {where} has a {name}")
    if in_place:
        check_shards(folder, manifest)
        listed = {record.name for record in manifest.shards}
        extra = sorted(path for path in folder.glob("shard-*.tar") if path.name not in listed)
        if extra:
            raise FormatError(f"{extra[0]}: not in the manifest; a folder holds one dataset, so prepare it again")
    checked_index(folder, manifest)
    if not manifest.samples:
        raise FormatError(f"{where}: holds no samples")
    return manifest
