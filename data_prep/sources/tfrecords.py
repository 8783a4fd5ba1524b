"""ProGAN's and StyleGAN's datasets: TFRecords of raw pixels, one resolution a file. Read without TensorFlow.

A file is a sequence of records, each framed as

    length        uint64, little-endian
    crc           uint32, masked CRC-32C of the 8 bytes of length
    data          `length` bytes: a tf.train.Example with `shape` (int64[3]: C, H, W) and `data` (C * H * W uint8)
    crc           uint32, masked CRC-32C of data

where masked(c) = rotate_right(c, 15) + 0xa282ead8 (mod 2^32).
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from PIL import Image

from data_prep.arrays import image_of_array
from data_prep.errors import InputError, Reject
from data_prep.format import UNLABELLED
from data_prep.sources.base import Wanted, fingerprint_of, needed_module
from data_prep.sources.label_files import labels_of_progan
from data_prep.sources.placed import PlacedSource
from data_prep.sources.protobuf import WireError, bytes_and_integers
from data_prep.sources.reading import check_length, read_at

LENGTH = struct.Struct("<QI")  # a record's length and its CRC
CRC = struct.Struct("<I")
MASK_DELTA = 0xA282EAD8


@dataclass(frozen=True)
class Record:
    """`length` bytes of file number `file` at `offset`, followed by their CRC."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TfrecordsSource(PlacedSource[Record]):
    """The records of all files of one resolution, in order; the fingerprint covers positions, lengths and labels."""

    files: list[Path]
    kind: ClassVar[str] = "tfrecords"

    @classmethod
    def open(cls, folder: Path, file_names: Sequence[str], wanted: Wanted) -> Self:
        """Open the files of resolution `wanted.size`, otherwise of the highest, and find their records.

        Raises InputError where a file is truncated or damaged, or google-crc32c is missing.
        """
        files, notice = _one_resolution([(folder / name).absolute() for name in file_names], wanted.size)
        others = len(file_names) - len(files)
        left_out = {"files of other resolutions": others} if others else {}
        records = [record for number, path in enumerate(files) for record in _frames(path, number)]
        first = {record.file: position for position, record in reversed(list(enumerate(records)))}
        names = [f"{files[record.file].name}:{i - first[record.file]}" for i, record in enumerate(records)]
        rows: list[list[object]] = [[name, record.offset, record.length] for name, record in zip(names, records)]
        classes, labels = list[str](), [UNLABELLED] * len(records)
        labelled = len(files) == 1 and wanted.labels == "auto"
        found = labels_of_progan(files[0], len(records)) if labelled else None
        if found is not None:
            classes, labels = found
            rows.append([classes, labels])
        return cls(
            files=files,
            names=names,
            places=records,
            labels=labels,
            classes=classes,
            fingerprint=fingerprint_of(rows),
            notice=notice,
            left_out=left_out,
        )

    def read(self, i: int) -> Image.Image:  # noqa: D102 - see Source
        record = self.places[i]
        check_length(record.length)
        framed = read_at(self.files[record.file], record.offset, record.length + CRC.size)
        data = framed[: record.length]
        if len(framed) < record.length + CRC.size or CRC.unpack(framed[record.length :])[0] != masked_crc32c(data):
            raise Reject("truncated or corrupt", "crc differs")
        return image_of_example(data)


def is_tfrecords(path: Path) -> bool:
    """Whether the file begins with a TFRecord's length and its CRC."""
    if ".tfrecord" not in path.name:  # avoids opening every file, and requiring the library for CRCs
        return False
    head = read_at(path, 0, LENGTH.size)
    return len(head) == LENGTH.size and LENGTH.unpack(head)[1] == masked_crc32c(head[:8])


def image_of_example(data: bytes) -> Image.Image:
    """The image of a serialised tf.train.Example with `shape` (C, H, W) and raw uint8 `data`.

    Raises Reject where it holds something else.
    """
    try:
        features = bytes_and_integers(data)
    except WireError as error:
        raise Reject("truncated or corrupt", f"tf.train.Example: {error}") from error
    shape, pixels = features.get("shape"), features.get("data")
    if not isinstance(shape, tuple) or len(shape) != 3 or not isinstance(pixels, bytes):
        raise Reject("unsupported pixels", f"tf.train.Example with {sorted(features)}; `shape` and `data` are read")
    channels, height, width = shape
    if channels not in (1, 3) or min(shape) < 1 or channels * height * width != len(pixels):
        raise Reject("unsupported pixels", f"shape {shape} in {len(pixels)} bytes; (1 or 3, H, W) of uint8 is read")
    return image_of_array(np.frombuffer(pixels, np.uint8).reshape(shape).transpose(1, 2, 0))


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum of `data`."""
    crc = needed_module("google_crc32c").value(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def _one_resolution(files: list[Path], size: int) -> tuple[list[Path], str | None]:
    """The files of resolution `size`, otherwise of the highest, and a notice where others are left out."""
    sides = {path: max(_first_image(path).size) for path in files}
    side = size if size in sides.values() else max(sides.values())
    chosen = [path for path in files if sides[path] == side]
    if len(chosen) == len(files):
        return chosen, None
    return (
        chosen,
        f"reads {', '.join(path.name for path in chosen)}: {side} pixels; there are {sorted(set(sides.values()))}",
    )


def _first_image(path: Path) -> Image.Image:
    record = next(_frames(path, 0), None)
    if record is None:
        raise InputError(f"{path}: holds no records")
    try:
        return image_of_example(read_at(path, record.offset, record.length))
    except Reject as reject:
        raise InputError(f"{path}: {reject.reason} in its first record ({reject.detail})") from reject


def _frames(path: Path, file: int) -> Iterator[Record]:
    """Positions of the records. Raises InputError where a length is damaged, since no later record can be found."""
    size, offset = path.stat().st_size, 0
    while offset < size:
        head = read_at(path, offset, LENGTH.size)
        if len(head) < LENGTH.size:
            raise InputError(f"{path}: cut at byte {size}, inside a record; fetch the file again")
        length, crc = LENGTH.unpack(head)
        if crc != masked_crc32c(head[:8]):
            raise InputError(
                f"{path}: the record at byte {offset} is damaged (crc of its length); fetch the file again"
            )
        if offset + LENGTH.size + length + CRC.size > size:
            raise InputError(f"{path}: cut at byte {size}, inside a record; fetch the file again")
        yield Record(file, offset + LENGTH.size, length)
        offset += LENGTH.size + length + CRC.size
