"""PNG chunks, to work around faults of Pillow: it rejects damaged metadata, and accepts incomplete pixels."""

import zlib
from collections.abc import Iterator

from PIL import Image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # of the first image
_PIECE = 1 << 20  # bytes to decompress at a time
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples per pixel, by the colour type in IHDR


def png_fault(data: bytes, image: Image.Image) -> str | None:
    """What the PNG file `data`, loaded as `image`, lacks; None where every row exists.

    Pillow leaves rows black that a stream does not contain; for interlaced files it raises an error itself.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if last_row.getbbox(alpha_only=False) is not None:  # None where all values are 0
        return None
    width, height, depth, colours = (
        int.from_bytes(data[a:b], "big") for a, b in ((16, 20), (20, 24), (24, 25), (25, 26))
    )
    row = 1 + (width * depth * _SAMPLES[colours] + 7) // 8
    found, expected = _unpacked_length(data, row * height), row * height
    return None if data[28] or found >= expected else f"{found} of {expected} bytes of pixels"


def _unpacked_length(data: bytes, most: int) -> int:
    """Decompressed size of all IDAT chunks together, counted up to `most`."""
    unpacker, length = zlib.decompressobj(), 0
    rest = b"".join(chunk[8:-4] for kind, chunk in _chunks(data) if kind == b"IDAT")
    try:
        while length < most and (piece := unpacker.decompress(rest, _PIECE)):
            length += len(piece)
            rest = unpacker.unconsumed_tail
    except zlib.error:  # after the last row, otherwise Pillow would have raised
        pass
    return length


def without_metadata(data: bytes) -> bytes:
    """The PNG file `data` without texts, profiles and times; intact EXIF is kept, for the orientation."""
    return PNG_MAGIC + b"".join(chunk for kind, chunk in _chunks(data) if kind in _PIXELS or _is_good_exif(kind, chunk))


def _is_good_exif(kind: bytes, chunk: bytes) -> bool:
    return kind == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and bytes of each chunk, the bytes including length, type and checksum."""
    at = len(PNG_MAGIC)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at:end]
        at = end
