"""Promises of ProGAN's TFRecords as a source; the files are written here from the format's description."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError, Reject
from data_prep.inspection.dataset import Dataset
from data_prep.sources import Wanted, open_source
from data_prep.sources.protobuf import bytes_and_integers
from data_prep.sources.tfrecords import masked_crc32c
from tests.data_prep_harness import data_prep


def crc32c(data: bytes) -> int:
    """Bit by bit: reflected polynomial 0x1EDC6F41 (Castagnoli)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF)


def varint(value: int) -> bytes:
    value %= 1 << 64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(pixels: np.ndarray, *, packed: bool = True, shape: tuple[int, ...] | None = None) -> bytes:
    """tf.train.Example as TFRecordExporter.add_image fills it; pixels: (C, H, W)."""
    numbers = [varint(side) for side in shape or pixels.shape]
    integers = field(1, b"".join(numbers)) if packed else b"".join(varint(1 << 3) + number for number in numbers)
    features = {"shape": field(3, integers), "data": field(1, field(1, pixels.tobytes()))}
    entries = [field(1, field(1, name.encode()) + field(2, feature)) for name, feature in features.items()]
    return field(1, b"".join(entries))


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def images(count: int, side: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (count, channels, side, side), dtype=np.uint8)


def write(folder: Path, resolution: int, count: int = 3) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    pixels = images(count, 2**resolution)
    name = f"celebahq-r{resolution:02d}.tfrecords"
    (folder / name).write_bytes(b"".join(framed(example(image)) for image in pixels))
    return pixels


def test_the_checksum_is_the_published_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of every catalogue of CRCs
    for data in (b"", b"123456789", bytes(1000)):
        assert struct.pack("<I", masked_crc32c(data)) == masked(data)


@pytest.mark.parametrize("packed", [True, False])
def test_a_message_is_parsed_however_its_integers_are_written(packed: bool) -> None:
    pixels = images(1, 4)[0]
    floats = field(1, field(1, b"mean") + field(2, field(2, field(1, struct.pack("<f", 0.5)))))
    unknown = varint(9 << 3) + varint(7) + varint(10 << 3 | 1) + bytes(8) + varint(11 << 3 | 5) + bytes(4)
    found = bytes_and_integers(unknown + example(pixels, packed=packed) + field(1, floats))
    assert found == {"shape": (3, 4, 4), "data": pixels.tobytes()}
    assert bytes_and_integers(example(pixels, shape=(-1, 2**40, 0)))["shape"] == (-1, 2**40, 0)


def test_every_pixel_of_the_asked_resolution_is_read(tmp_path: Path) -> None:
    pixels = {2**resolution: write(tmp_path / "in", resolution) for resolution in (2, 3, 4)}
    for asked, taken in ((8, 8), (4, 4), (16, 16), (5, 16)):  # of none, the highest
        source = open_source(str(tmp_path / "in"), Wanted(size=asked))
        assert [np.asarray(source.read(i)).tolist() for i in range(3)] == pixels[taken].transpose(0, 2, 3, 1).tolist()
        assert f"{taken} pixels; there are [4, 8, 16]" in source.notice
    part = pickle.loads(pickle.dumps(source.part(1, 3)))  # noqa: S301 - our own, on its way to a worker
    np.testing.assert_array_equal(np.asarray(part.read(1)), np.asarray(source.read(2)))


def test_grey_records_and_several_files_are_read(tmp_path: Path) -> None:
    grey = images(2, 8, channels=1)
    for number in range(2):
        (tmp_path / f"part{number}.tfrecords").write_bytes(framed(example(grey[number])))
    source = open_source(str(tmp_path))
    assert list(source.names) == ["part0.tfrecords:0", "part1.tfrecords:0"]
    for i in range(2):
        np.testing.assert_array_equal(np.asarray(source.read(i)), grey[i, 0])


def test_a_dataset_is_made_of_it(tmp_path: Path) -> None:
    pixels = write(tmp_path / "in", 3, count=7)
    assert data_prep(tmp_path / "in", tmp_path / "out", "--size", 8, "--shard-samples", 3, "--workers", 2) == 0
    dataset = Dataset.open(tmp_path / "out")
    for i, image in enumerate(pixels.transpose(0, 2, 3, 1)):
        np.testing.assert_array_equal(np.asarray(dataset.read(i)), image)


def test_a_flipped_bit_of_a_record_rejects_that_one(tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = tmp_path / "celebahq-r03.tfrecords"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4  # in the second of three
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(Reject, match="truncated or corrupt"):
        source.read(1)
    source.read(0), source.read(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cut at byte"),
        (lambda data: data[: len(data) // 3 * 2 + 5], "cut at byte"),
        (lambda data: data[: len(data) // 3] + b"\x01" + data[len(data) // 3 + 1 :], "crc of its length"),
        (lambda data: data + bytes(12), "crc of its length"),
    ],
)
def test_a_damaged_frame_is_an_error_not_a_shorter_dataset(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path, 3)
    path = tmp_path / "celebahq-r03.tfrecords"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        open_source(str(path))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (field(1, b""), "unsupported pixels"),
        (b"\xff" * 20, "truncated or corrupt"),
        (example(images(1, 8)[0], shape=(3, 8, 9)), "unsupported pixels"),
        (example(images(1, 8)[0], shape=(-3, -8, 8)), "unsupported pixels"),
        (example(images(1, 8, channels=4)[0]), "unsupported pixels"),
    ],
)
def test_a_record_that_is_no_image_is_rejected(tmp_path: Path, record: bytes, reason: str) -> None:
    good = framed(example(images(1, 8)[0]))
    (tmp_path / "a.tfrecords").write_bytes(good + framed(record))
    with pytest.raises(Reject, match=reason):
        open_source(str(tmp_path)).read(1)
