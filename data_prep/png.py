"""PNG chunks: the ones that make the pixels, without the others, for one of which Pillow refuses the whole file."""

import zlib
from collections.abc import Iterator

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # of the first image
_ORIENTATION = b"eXIf"


def without_metadata(data: bytes) -> bytes:
    """The PNG file `data` without texts, profiles and times; EXIF stays, for the orientation, where it is intact."""
    return PNG_MAGIC + b"".join(_chunks_to_keep(data))


def _chunks_to_keep(data: bytes) -> Iterator[bytes]:
    at = len(PNG_MAGIC)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind, content, checksum
        chunk, kind = data[at:end], data[at + 4 : at + 8]
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind in _PIXELS or (kind == _ORIENTATION and intact):
            yield chunk
        at = end
