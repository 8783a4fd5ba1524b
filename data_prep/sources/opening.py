"""Detects what a folder contains: a published dataset, archives of one kind, or images."""

import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from data_prep.errors import InputError
from data_prep.format import INDEX_NAME, MANIFEST_NAME
from data_prep.sources import cifar, lmdb, parquet, tar, tfrecords
from data_prep.sources.base import Source, Wanted
from data_prep.sources.cifar import CifarSource
from data_prep.sources.folder import FolderSource
from data_prep.sources.lmdb import LmdbSource
from data_prep.sources.parquet import ParquetSource
from data_prep.sources.reading import begins_with
from data_prep.sources.rules import SIDECAR, has_image_suffix
from data_prep.sources.splits import chosen_of, split_of_file
from data_prep.sources.tar import TarSource
from data_prep.sources.tfrecords import TfrecordsSource
from data_prep.sources.walk import Listing, list_files
from data_prep.sources.zip import ZipSource

FURTHER = "archives in further folders"

ArchiveSource = ParquetSource | TarSource | TfrecordsSource | ZipSource


@dataclass(frozen=True)
class Kind:
    """A kind of archive: what opens it, file suffix, detection by content, and whether it may contain splits."""

    source: type[ArchiveSource]
    ending: str
    is_one: Callable[[Path], bool]
    has_splits: bool


KINDS = [
    Kind(TfrecordsSource, ending="", is_one=lambda path: tfrecords.is_tfrecords(path), has_splits=False),
    Kind(ParquetSource, ending=".parquet", is_one=lambda path: begins_with(path, parquet.MAGIC), has_splits=False),
    Kind(TarSource, ending=".tar", is_one=lambda path: begins_with(path, tar.MAGIC, at=tar.MAGIC_AT), has_splits=True),
    Kind(ZipSource, ending=".zip", is_one=zipfile.is_zipfile, has_splits=True),
]


def open_folder(folder: Path, wanted: Wanted) -> Source:
    """Open the content of `folder`.

    Raises InputError where it is of several kinds, all but one of which would be left out, or cannot be read.
    """
    if (folder / lmdb.DATA_NAME).is_file():
        return LmdbSource.open(folder)
    if cifar.find_batches(folder):
        return CifarSource.open(folder, wanted.split)
    if (folder / MANIFEST_NAME).is_file() and (folder / INDEX_NAME).is_file():
        raise InputError(f"{folder}: is prepared already; data.path = {str(folder)!r} trains on it")
    folder = _revision(folder)
    listing = list_files(folder)
    shards = _without_shard_metadata(listing)
    found = [(kind, archives) for kind in KINDS if (archives := _of_kind(kind, listing))]
    image = next((name for name in listing.names if has_image_suffix(name)), None)
    if found and (len(found) > 1 or image is not None):
        other = image or found[1][1][0]
        raise InputError(f"{folder}: holds {found[0][1][0]} and {other}; give a folder of one kind")
    if found:
        kind, archives = found[0]
        nearest = _nearest(archives)
        listing.left_out[FURTHER] += len(archives) - len(nearest)
        listing.left_out[SIDECAR] += len(listing.names) - len(archives)
        return open_archives(kind, folder, nearest, wanted, listing)
    if databases := sorted(folder.glob(f"*/{lmdb.DATA_NAME}")):
        raise InputError(f"{folder}: holds {len(databases)} LMDBs; give one of them, such as {databases[0].parent}")
    return FolderSource.open(listing, wanted, shards=shards)


def open_archives(kind: Kind, folder: Path, names: Sequence[str], wanted: Wanted, listing: Listing) -> ArchiveSource:
    """Open the archives of the requested split; `names` are relative to `folder`.

    Files left out of `listing` count as left out of the source. Raises InputError where there is no such split, or the
    archives cannot be read.
    """
    splits = [split_of_file(name) for name in names]
    chosen = list(range(len(names)))
    if any(splits) or not kind.has_splits:
        found = chosen_of(splits, wanted.split, str(folder))
        if found is None and kind.source is ParquetSource and wanted.split in splits:
            found = [position for position, split in enumerate(splits) if split == wanted.split]
        if found is not None:
            chosen, wanted = found, replace(wanted, split="all")
    left_out = Counter(f"files of split {splits[i]}" for i in set(range(len(names))) - set(chosen))
    taken = [names[i] for i in chosen]
    source = kind.source.open(folder, taken, wanted)
    notices = [f"reads {len(taken)} of {len(names)} files: split {splits[chosen[0]]}"] if left_out else []
    notices = [*listing.notices, *notices, *([source.notice] if source.notice else [])]
    total = Counter(source.left_out) + listing.left_out + left_out
    return replace(source, notice="\n".join(notices) or None, left_out=total)


def _revision(folder: Path) -> Path:
    """The files of a dataset in Hugging Face's cache: of the branch main, or of the only revision."""
    revisions = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    if not revisions or not (folder / "blobs").is_dir():
        return folder
    main = folder / "refs" / "main"
    named = folder / "snapshots" / main.read_text().strip() if main.is_file() else revisions[0]
    if len(revisions) > 1 and named not in (revisions if main.is_file() else []):
        raise InputError(f"{folder}: holds {len(revisions)} snapshots; give one of them, such as {revisions[0]}")
    return named if named in revisions else revisions[0]


def _without_shard_metadata(listing: Listing) -> frozenset[str]:
    """Remove img2dataset's parquet files, which have metadata on the tar or folder of the same name.

    Returns those folders' names.
    """
    tables = [name for name in listing.names if name.endswith(".parquet")]
    if not tables:
        return frozenset()
    tars = {name.removesuffix(".tar") for name in listing.names if name.endswith(".tar")}
    folders = {str(PurePosixPath(name).parent) for name in listing.names}
    shards = {name.removesuffix(".parquet") for name in tables}
    about = tables if shards & tars else [name for name in tables if name.removesuffix(".parquet") in folders]
    if about:
        listing.names = sorted(set(listing.names) - set(about))
        listing.left_out[SIDECAR] += len(about)
    return frozenset(PurePosixPath(shard).name for shard in shards & folders)


def _of_kind(kind: Kind, listing: Listing) -> list[str]:
    """The archives of a kind in a folder; a .tar counts by its name, so that a damaged one is an error."""
    named = [name for name in listing.names if name.endswith(kind.ending) and (listing.root / name).is_file()]
    return named if kind.source is TarSource else [name for name in named if kind.is_one(listing.root / name)]


def _nearest(archives: list[str]) -> list[str]:
    """Archives at the top level, otherwise in `data/`, where Hugging Face's repositories have them, otherwise all."""
    for folder in (".", "data"):
        if found := [name for name in archives if str(PurePosixPath(name).parent) == folder]:
            return found
    return archives
