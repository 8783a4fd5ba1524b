"""Where images come from; what lies there is told by its content, not by its name."""

import zipfile
from pathlib import Path
from typing import Literal, get_args

from data_prep.errors import InputError
from data_prep.sources import cifar, lmdb, parquet, tar, tfrecords
from data_prep.sources.base import Source, has_image_suffix
from data_prep.sources.cifar import CifarSource
from data_prep.sources.embedded import Mnist5kSource
from data_prep.sources.folder import FolderSource, file_names
from data_prep.sources.lmdb import LmdbSource
from data_prep.sources.parquet import ParquetSource
from data_prep.sources.tar import TarSource
from data_prep.sources.tfrecords import TfrecordsSource
from data_prep.sources.zip import ZipSource

__all__ = ["SPLITS", "Source", "Split", "open_source"]

Split = Literal["train", "test", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)

EMBEDDED_PREFIX = "embedded:"
KNOWN = "LSUN's LMDB, a folder of images, .zip, .tar, .tfrecords, .parquet or CIFAR-10"


def open_source(spec: str, *, size: int = 256, split: Split = "train") -> Source:
    """Open what the command line calls SRC.

    `size` chooses among TFRecords of several resolutions, and `split` among the parts of CIFAR-10 and of Hugging Face
    datasets. Raises InputError where `spec` is nothing we read, holds no file at all, or has no such part.
    """
    try:
        source = _open_embedded(spec) if spec.startswith(EMBEDDED_PREFIX) else _open_path(Path(spec), size, split)
    except OSError as error:
        raise InputError(f"{error.filename or spec}: cannot be read ({error.strerror or error})") from error
    if split != "train" and source.kind not in ("cifar10", "parquet"):
        raise InputError(f"{spec}: --split {split} is for CIFAR-10 and Hugging Face parquet; this is {source.kind}")
    if not source.names:
        raise InputError(f"{spec}: holds no files; give {KNOWN}, with images in it")
    return source


def _open_embedded(spec: str) -> Source:
    if spec != EMBEDDED_PREFIX + "mnist5k":
        raise InputError(f"{spec}: no such embedded set; there is {EMBEDDED_PREFIX}mnist5k")
    return Mnist5kSource.open()


def _open_path(path: Path, size: int, split: Split) -> Source:
    if path.is_dir():
        return _open_folder(path, size, split)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.name == lmdb.DATA_NAME:
        return LmdbSource.open(path.parent)
    if cifar.is_gzip(path):
        return CifarSource.open(path, split)
    if parquet.is_parquet(path):
        return ParquetSource.open([path], split)
    if tfrecords.is_tfrecords(path):
        return TfrecordsSource.open([path], size)
    if tar.is_tar(path):
        return TarSource.open([path])
    if zipfile.is_zipfile(path):
        return ZipSource.open(path)
    raise InputError(f"{path}: neither a folder nor a readable archive; give {KNOWN}")


def _open_folder(folder: Path, size: int, split: Split) -> Source:
    if (folder / lmdb.DATA_NAME).is_file():
        return LmdbSource.open(folder)
    if cifar.find_batches(folder):
        return CifarSource.open(folder, split)
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if shards := [path for path in files if tfrecords.is_tfrecords(path)]:
        _check_unmixed(folder, shards[0])
        return TfrecordsSource.open(shards, size)
    if shards := parquet.find_files(folder):
        _check_unmixed(folder, shards[0])
        return ParquetSource.open(shards, split)
    if shards := [path for path in files if path.suffix == ".tar"]:
        _check_unmixed(folder, shards[0])
        return TarSource.open(shards)
    if databases := sorted(folder.glob(f"*/{lmdb.DATA_NAME}")):
        raise InputError(f"{folder}: holds {len(databases)} LMDBs; give one of them, such as {databases[0].parent}")
    return FolderSource.open(folder)


def _check_unmixed(folder: Path, archive: Path) -> None:
    """Raise InputError where images lie beside an archive or below it: one of the two would be left out unsaid."""
    image = next((name for name in file_names(folder) if has_image_suffix(name)), None)
    if image is not None:
        raise InputError(f"{folder}: holds {archive.relative_to(folder)} and {image}; give a folder of one kind")
