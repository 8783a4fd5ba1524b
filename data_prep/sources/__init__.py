"""Sources of images; their kind is detected by content, not by file name."""

from importlib.metadata import entry_points
from pathlib import Path

from data_prep.errors import InputError
from data_prep.sources import cifar, lmdb
from data_prep.sources.base import AS_USUAL, LABELS, Source, Wanted
from data_prep.sources.cifar import CifarSource
from data_prep.sources.embedded import Mnist5kSource
from data_prep.sources.lmdb import LmdbSource
from data_prep.sources.members import PAIR
from data_prep.sources.opening import KINDS, open_archives, open_folder
from data_prep.sources.splits import SPLITS, Split, split_called
from data_prep.sources.unlabelled import UnlabelledSource
from data_prep.sources.walk import Listing

__all__ = ["LABELS", "SPLITS", "Source", "Split", "Wanted", "open_source", "split_called"]

EMBEDDED_PREFIX = "embedded:"
KNOWN = "LSUN's LMDB, a folder of images, .zip, .tar, .tfrecords, .parquet or CIFAR-10"
WITHOUT_SPLITS = ("lmdb", "tfrecords", "embedded")


def open_source(spec: str, wanted: Wanted = AS_USUAL) -> Source:
    """Open the source given as SRC on the command line.

    Raises InputError where `spec` is of no supported kind, contains no image at all, or lacks the requested split,
    captions or second images.
    """
    try:
        source = _open_embedded(spec) if spec.startswith(EMBEDDED_PREFIX) else _open_path(Path(spec), wanted)
    except OSError as error:
        raise InputError(f"{error.filename or spec}: cannot be read ({error.strerror or error})") from error
    if wanted.split != "train" and source.kind in WITHOUT_SPLITS:
        raise InputError(f"{spec}: --split {wanted.split} is for sources that have splits; this is {source.kind}")
    if wanted.image_column is not None and source.kind != "parquet":
        raise InputError(f"{spec}: --image-column {wanted.image_column} is for parquet; this is {source.kind}")
    if not source.names:
        told = ", ".join(f"{count} {rule}" for rule, count in source.left_out.items())
        holds = f"holds no images (left out: {told})" if told else "holds no files"
        raise InputError(f"{spec}: {holds}; give {KNOWN}, with images in it")
    if wanted.labels == "none":
        source = UnlabelledSource(source)
    if wanted.caption_column is not None and "txt" not in source.members:
        raise InputError(f"{spec}: --caption-column {wanted.caption_column}: there is no such column of text")
    if wanted.pair is not None and PAIR not in source.members:
        raise InputError(f"{spec}: --pair {wanted.pair}: no image has a second one of that name")
    return source


def _open_embedded(spec: str) -> Source:
    """Images inside a package: this one, or another with an entry point of the set's name, in ddpm_trainer.sources."""
    name = spec.removeprefix(EMBEDDED_PREFIX)
    if name == "mnist5k":
        return Mnist5kSource.open()
    for extension in entry_points(group="ddpm_trainer.sources", name=name):
        return extension.load()()
    raise InputError(f"{spec}: no such embedded set; there is {EMBEDDED_PREFIX}mnist5k")


def _open_path(path: Path, wanted: Wanted) -> Source:
    if path.is_dir():
        return open_folder(path, wanted)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.name == lmdb.DATA_NAME:
        return LmdbSource.open(path.parent)
    if cifar.is_gzip(path):
        return CifarSource.open(path, wanted.split)
    kind = next((kind for kind in KINDS if kind.is_one(path)), None)
    if kind is None:
        raise InputError(f"{path}: neither a folder nor a readable archive; give {KNOWN}")
    return open_archives(kind, path.parent, [path.name], wanted, Listing(path.parent))
