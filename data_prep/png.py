"""PNG chunks, for two faults of Pillow: it refuses files for damage beside their pixels, and takes unfinished ones."""

import zlib
from collections.abc import Iterator

from PIL import Image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # of the first image
_PIECE = 1 << 20  # bytes unpacked at once
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by IHDR's type of colours


def png_fault(data: bytes, image: Image.Image) -> str | None:
    """What is missing of the PNG file `data`, loaded as `image`; None where every row is there.

    Pillow leaves rows black for which a finished stream has no data; with interlacing it finds that itself.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if last_row.getbbox(alpha_only=False) is not None:  # which is None where all values are 0
        return None
    width, height, depth, colours = (
        int.from_bytes(data[a:b], "big") for a, b in ((16, 20), (20, 24), (24, 25), (25, 26))
    )
    row = 1 + (width * depth * _SAMPLES[colours] + 7) // 8
    found, expected = _unpacked_length(data, row * height), row * height
    return None if data[28] or found >= expected else f"{found} of {expected} bytes of pixels"


def _unpacked_length(data: bytes, most: int) -> int:
    """Bytes of all IDAT chunks together, counted up to `most`."""
    unpacker, length = zlib.decompressobj(), 0
    rest = b"".join(chunk[8:-4] for kind, chunk in _chunks(data) if kind == b"IDAT")
    try:
        while length < most and (piece := unpacker.decompress(rest, _PIECE)):
            length += len(piece)
            rest = unpacker.unconsumed_tail
    except zlib.error:  # behind the last row, or Pillow would have said so
        pass
    return length


def without_metadata(data: bytes) -> bytes:
    """The PNG file `data` without texts, profiles and times; EXIF stays, for the orientation, where it is intact."""
    return PNG_MAGIC + b"".join(chunk for kind, chunk in _chunks(data) if kind in _PIXELS or _is_good_exif(kind, chunk))


def _is_good_exif(kind: bytes, chunk: bytes) -> bool:
    return kind == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of each chunk: length, kind, content, checksum."""
    at = len(PNG_MAGIC)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at:end]
        at = end
