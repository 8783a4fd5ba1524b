"""Reader of finished datasets for inspection and verification; the trainer has its own, faster one."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.arrays import array_of_npy
from data_prep.errors import InputError
from data_prep.format import (
    INDEX_DTYPE,
    MEMBERS,
    FormatError,
    Manifest,
    center_crop_box,
    checked_index,
    crc32,
    load_index,
    load_manifest,
)
from data_prep.jpeg import JPEG_MAGIC, jpeg_fault
from data_prep.png import PNG_MAGIC, png_fault

MAX_OFFSET = 2**62  # larger than any file's size and the kernel's offset type


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Manifest and index of one folder. `index`: (samples,) of `index_dtype`, memory-mapped."""

    folder: Path
    manifest: Manifest
    index: npt.NDArray[np.void]

    @classmethod
    def open(cls, folder: Path, *, check_index: bool = True) -> "Dataset":
        """Open a finished dataset. Raises FormatError where there is none, or its index is not the manifest's.

        Verification does without `check_index`, since it reports all faults.
        """
        manifest, load = load_manifest(folder), checked_index if check_index else load_index
        return cls(folder=folder, manifest=manifest, index=load(folder, manifest))

    def rows_of(self, shard: int) -> npt.NDArray[np.void]:
        """The index's rows of one shard, in the order of members."""
        first, last = np.searchsorted(self.index["shard"], [shard, shard + 1])
        return self.index[first:last]

    def path_of(self, shard: int) -> Path:
        """Path of a shard."""
        return self.folder / self.manifest.shards[shard].name

    def read(self, sample: int) -> Image.Image:
        """Decode a sample as the trainer does. Raises InputError where it is damaged."""
        row = self.index[sample]
        path = self.path_of(int(row["shard"]))
        with opened(path) as descriptor:
            data = member_bytes(descriptor, row)
        if crc32(data) != row["crc32"]:
            raise InputError(f"{path}: member {row['key']:09d} is damaged (crc32 differs from the index)")
        try:
            return decode_member(data, self.manifest)
        except FormatError as error:
            raise InputError(f"{path}: member {row['key']:09d} {error}") from error


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor for reading `path`. Raises InputError where it does not exist."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def member_bytes(descriptor: int, row: np.void) -> bytes:
    """The bytes at an index row's offset and length, of an image or a further member; fewer where the file ends."""
    return os.pread(descriptor, int(row["length"]), min(int(row["offset"]), MAX_OFFSET))


def places_of(row: np.void) -> list[tuple[str, np.void]]:
    """Name and place of each of a sample's members, in the order of the tar; the image has no name."""
    further = (row.dtype.names or ())[len(INDEX_DTYPE.names or ()) :]
    return [("", row), *((name, row[name]) for name in further if row[name]["offset"])]


def check_member(name: str, data: bytes, label: int, manifest: Manifest) -> None:
    """Raise FormatError, as `decode_member`, where a further member is not what its name says."""
    try:
        match MEMBERS[name]:
            case "image":
                decode_member(data, manifest, manifest.members[name])
            case "class" if data != b"%d" % label:
                raise FormatError(f"is {data[:20]!r}, the index says {label}")
            case "text":
                data.decode()
            case "array":
                array_of_npy(data)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"cannot be decoded ({error})") from error


def decode_member(data: bytes, manifest: Manifest, side: int | None = None) -> Image.Image:
    """Decode an image's bytes to `side` squared (default: `image_size`), in the manifest's mode.

    Raises FormatError where they are something else; its message begins with a verb, for the caller to add a subject.
    """
    size, mode = side or manifest.image_size, manifest.mode
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        image.load()
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise FormatError(f"cannot be decoded ({type(error).__name__}: {error})") from error
    fault = jpeg_fault(data) if data.startswith(JPEG_MAGIC) else None
    fault = png_fault(data, image) if data.startswith(PNG_MAGIC) else fault
    if fault is not None:
        raise FormatError(f"cannot be decoded ({fault})")
    if image.mode not in (mode, "RGB"):  # WebP has no grey mode: grey is decoded to three equal channels
        raise FormatError(f"is {image.mode}, the manifest says {mode}")
    if image.size != (size, size):
        if not manifest.crops:
            raise FormatError(f"is {image.width}x{image.height}, the manifest says {size}x{size}")
        image = image.crop(center_crop_box(*image.size, size))
    return image if image.mode == mode else image.convert(mode)
