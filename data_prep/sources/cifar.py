"""CIFAR-10 as distributed by its authors: the Python or the binary version, as an archive or unpacked.

Python: `data_batch_1` ... `data_batch_5` and `test_batch`, each a pickled dict of `data` ((10000, 3072) uint8: red,
green and blue planes of 32 x 32) and `labels`, and `batches.meta` with `label_names`; see HarmlessUnpickler.
Binary: the same with `.bin`, each image one byte of label and 3072 of pixels, and `batches.meta.txt`.
"""

import io
import math
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from data_prep.errors import InputError
from data_prep.sources.placed import PixelsSource, fingerprint_of_pixels
from data_prep.sources.reading import begins_with

SIDE = 32
PIXELS = 3 * SIDE * SIDE
CLASSES = 10
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
META = "batches.meta"
META_TEXT = "batches.meta.txt"
KNOWN_NAMES = {META, META_TEXT} | {name + end for names in BATCHES.values() for name in names for end in ("", ".bin")}
MAX_FILE_BYTES = 64 * 1024**2  # twice the size of a batch
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True, eq=False)
class CifarSource(PixelsSource):
    """Pixels are (3, 32, 32), labels 0..9; the fingerprint covers all of both."""

    kind: ClassVar[str] = "cifar10"

    @classmethod
    def open(cls, path: Path, split: str) -> Self:
        """Load the train batches (150 MB) or the test batch. Raises InputError where one is missing or malformed."""
        if split not in BATCHES:
            raise InputError(f"{path}: CIFAR-10 has no split {split}; it has {', '.join(BATCHES)}")
        files = _files_of_archive(path) if path.is_file() else _files_of_folder(path)
        batches = [_batch(path, files, name) for name in BATCHES[split]]
        pixels = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, SIDE, SIDE)
        labels = np.concatenate([labels for _, labels in batches])
        names = [f"{name}/{i}" for name, (_, rows) in zip(BATCHES[split], batches) for i in range(len(rows))]
        return cls(
            names=names,
            places=list(pixels),
            labels=labels.tolist(),
            classes=_class_names(path, files),
            fingerprint=fingerprint_of_pixels(pixels, labels),
        )


def is_gzip(path: Path) -> bool:
    """Whether the file is gzip-compressed, as CIFAR-10's archives are."""
    return begins_with(path, GZIP_MAGIC)


def find_batches(folder: Path) -> Path | None:
    """The folder of the batches: `folder`, or the one that unpacking the archive made in it; None without batches."""
    places = [folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"]
    return next((place for place in places if any((place / name).is_file() for name in KNOWN_NAMES - {META})), None)


def _files_of_folder(folder: Path) -> dict[str, bytes]:
    place = find_batches(folder) or folder
    try:
        return {name: (place / name).read_bytes() for name in sorted(KNOWN_NAMES) if (place / name).is_file()}
    except OSError as error:
        raise InputError(f"{place}: cannot be read ({error.strerror})") from error


def _files_of_archive(path: Path) -> dict[str, bytes]:
    """Regular files with known names, read into memory; their folders in the archive are ignored."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if member.isfile() and name in KNOWN_NAMES and member.size <= MAX_FILE_BYTES:
                    content = tar.extractfile(member)
                    assert content is not None  # since it is a regular file
                    files[name] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a readable .tar.gz ({error})") from error
    if not files.keys() & (KNOWN_NAMES - {META, META_TEXT}):
        raise InputError(f"{path}: compressed and not CIFAR-10, so images cannot be read in place; unpack it first")
    return files


def _batch(path: Path, files: dict[str, bytes], name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels (n, 3072) and labels (n,) of one batch, in either version."""
    if name in files:
        pixels, labels = _unpickled_batch(f"{path}: {name}", files[name])
    elif f"{name}.bin" in files:
        rows = np.frombuffer(files[f"{name}.bin"], np.uint8)
        if len(rows) % (PIXELS + 1):
            raise InputError(f"{path}: {name}.bin is cut; {len(rows)} bytes are no multiple of {PIXELS + 1}")
        rows = rows.reshape(-1, PIXELS + 1)
        pixels, labels = rows[:, 1:], rows[:, 0].astype(np.int64)
    else:
        raise InputError(f"{path}: has no {name}; fetch CIFAR-10 again")
    if not len(labels) or labels.min() < 0 or labels.max() >= CLASSES:
        raise InputError(f"{path}: {name} has labels outside 0..{CLASSES - 1}")
    return pixels, labels


def _unpickled_batch(place: str, data: bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    batch = _unpickled(place, data)
    pixels, labels = (batch.get(b"data"), batch.get(b"labels")) if isinstance(batch, dict) else (None, None)
    pixels = pixels.array if isinstance(pixels, PickledArray) else None
    if pixels is None or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        raise InputError(f"{place}: not a batch of CIFAR-10; `data` should be (N, {PIXELS}) of uint8")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise InputError(f"{place}: not a batch of CIFAR-10; `labels` should be {len(pixels)} integers")
    return pixels, np.array(labels, np.int64)


def _class_names(path: Path, files: dict[str, bytes]) -> list[str]:
    """Class names from the meta file, otherwise the numbers. Raises InputError where the meta file is malformed."""
    names: list[str] = []
    if META in files:
        meta = _unpickled(f"{path}: {META}", files[META])
        found = meta.get(b"label_names") if isinstance(meta, dict) else None
        if found is not None and not (isinstance(found, list) and all(isinstance(name, bytes | str) for name in found)):
            raise InputError(f"{path}: {META} is not CIFAR-10's; `label_names` should be a list of words")
        names = [name if isinstance(name, str) else name.decode(errors="replace") for name in found or []]
    elif META_TEXT in files:
        names = files[META_TEXT].decode(errors="replace").split()
    return names if len(names) == CLASSES else [str(label) for label in range(CLASSES)]


def _unpickled(place: str, data: bytes) -> Any:
    try:
        return HarmlessUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a malformed pickle may raise any exception
        raise InputError(f"{place}: cannot be read as CIFAR-10's pickle ({error})") from error


NDARRAY = object()  # a placeholder for the class, not callable
DTYPES = frozenset({"u1", "|u1", "i8", "<i8"})  # without a sign of the byte order: little-endian


class HarmlessUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, bytes and PickledArrays; calls nothing else.

    Numpy's own functions are not called, since a malicious pickle could make its constructor treat arbitrary bytes as
    object pointers. Raises UnpicklingError for a pickle with names beyond the five that arrays of bytes need.
    """

    def find_class(self, module: str, name: str) -> Any:
        """The replacement for a name in a pickle. NumPy 1 and Python 2 use the older two for the same objects."""
        admitted = {
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): NDARRAY,
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): _latin_1,
        }
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a data set")
        return admitted[module, name]


class PickledArray:
    """Replacement for an array in numpy's pickle format: created empty, then given its state."""

    array: npt.NDArray[Any] | None = None

    def __setstate__(self, state: object) -> None:
        """Set (version, shape, dtype, is_fortran, bytes); raises UnpicklingError for anything else."""
        match state:
            case (int(), tuple(shape), PickledDtype() as kind, bool() | int() as fortran, bytes(data)):
                values = np.frombuffer(data, kind.dtype)
                if all(type(side) is int and side >= 0 for side in shape) and math.prod(shape) == len(values):
                    self.array = values.reshape(shape, order="F" if fortran else "C")
                    return
        raise pickle.UnpicklingError("an array whose shape, type and bytes do not belong together")


class PickledDtype:
    """One of `DTYPES`. The state in a pickle is ignored, since the name determines the dtype."""

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(name).newbyteorder("<")

    def __setstate__(self, _state: object) -> None:
        """Ignore the state."""


def _empty_array(kind: object, shape: object, _code: object) -> PickledArray:
    """Replacement for numpy's `_reconstruct`, which creates every array equally; its state is set afterwards."""
    if kind is not NDARRAY or shape != (0,):
        raise pickle.UnpicklingError("an array that numpy did not write")
    return PickledArray()


def _dtype(name: object, _align: object = 0, _copy: object = 0) -> PickledDtype:
    text = name.decode("latin1") if isinstance(name, bytes) else name
    if not isinstance(text, str) or text not in DTYPES:
        raise pickle.UnpicklingError(f"an array of {text!r}, where CIFAR-10 has uint8")
    return PickledDtype(text)


def _latin_1(text: object, codec: object = "latin1") -> bytes:
    """Replacement for the codec call by which Python 3 pickles bytes for Python 2."""
    if not isinstance(text, str) or codec not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("a codec other than latin1")
    return text.encode("latin1")
