"""The subset of protocol buffers needed for a tf.train.Example of bytes and integers.

Example { Features features = 1; }
Features { map<string, Feature> feature = 1; }          an entry is a message { key = 1; value = 2 }
Feature { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; }
BytesList { repeated bytes value = 1; }                 Int64List { repeated int64 value = 1, packed or not }
"""

from collections.abc import Iterator

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types
MAX_VARINT_BYTES = 10
TWO_64 = 1 << 64


class WireError(ValueError):
    """Malformed message."""


def bytes_and_integers(example: bytes) -> dict[str, bytes | tuple[int, ...]]:
    """The features of a serialised Example by name: the first element of a bytes list, all of an integer list.

    An empty bytes list gives b""; lists of floats are left out. Raises WireError where `example` is truncated or
    another message.
    """
    features: dict[str, bytes | tuple[int, ...]] = {}
    for container in _messages(example, 1):
        for entry in _messages(container, 1):
            name = b"".join(_messages(entry, 1)).decode(errors="replace")
            for feature in _messages(entry, 2):
                for values in _messages(feature, 1):
                    features[name] = next(_messages(values, 1), b"")
                for values in _messages(feature, 3):
                    features[name] = tuple(_integers(values))
    return features


def _messages(data: bytes, wanted: int) -> Iterator[bytes]:
    """The length-delimited fields of number `wanted`."""
    for number, value in _fields(data):
        if number == wanted and isinstance(value, bytes):
            yield value


def _integers(data: bytes) -> Iterator[int]:
    """Field 1 as signed 64-bit integers, packed or not."""
    for number, value in _fields(data):
        if number != 1:
            continue
        if isinstance(value, int):
            yield _signed(value)
            continue
        position = 0
        while position < len(value):
            integer, position = _varint(value, position)
            yield _signed(integer)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an int for varints, otherwise the bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == LENGTH_DELIMITED:
            length, position = _varint(data, position)
        elif wire_type in (FIXED64, FIXED32):
            length = 8 if wire_type == FIXED64 else 4
        else:
            raise WireError(f"wire type {wire_type}")
        if position + length > len(data):
            raise WireError("cut inside a field")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The integer at `position`, in groups of seven bits from the lowest, and the position after it."""
    value = 0
    for i, byte in enumerate(data[position : position + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value % TWO_64, position + i + 1
    raise WireError("cut inside a number")


def _signed(value: int) -> int:
    return value - TWO_64 if value >= TWO_64 // 2 else value
