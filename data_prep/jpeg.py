"""Whether a JPEG is whole, which its readers do not ask: they fill with grey whatever is missing, and say nothing.

libjpeg counts such faults as warnings; simplejpeg passes them on, Pillow does not. What they say of the data that make
the pixels is a fault; what they say of the frame around those (stray bytes between segments, the SOS parameters of
some cameras) is none, for every pixel is there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.errors import InputError

try:
    import simplejpeg
except ImportError:  # told of when a JPEG comes
    simplejpeg = None

JPEG_MAGIC = b"\xff\xd8\xff"
NEEDS_SIMPLEJPEG = "JPEGs need simplejpeg, which tells the whole ones from the damaged: pip install simplejpeg"

_HOLE = bytes(256)  # half a sector: what a download or a copy has left out comes in whole ones

_EOI, _SOS, _DHT = 0xD9, 0xDA, 0xC4
_SEQUENTIAL = {0xC0, 0xC1}
_FRAMES = {*range(0xC0, 0xD0)} - {_DHT, 0xC8, 0xCC}
_METADATA = {*range(0xE0, 0xF0), 0xFE}
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment
_WHOLE_BLOCK = bytes((0, 63, 0))  # first and last coefficient, and bits: the only ones of a sequential JPEG
_ZRL = 0xF0  # sixteen zero coefficients, and the block goes on

_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SCAN_END = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


@dataclass(frozen=True)
class _Segment:
    """`payload` without its length; `scan` is the entropy-coded data behind an SOS, restart markers included."""

    marker: int
    length: bytes
    payload: bytes
    scan: bytes = b""


def jpeg_fault(data: bytes) -> str | None:
    """What is damaged or missing in a JPEG file, in libjpeg's words where it has any; None where every pixel is there.

    Decodes all data, but only an eighth of the pixels to a side. Raises InputError where simplejpeg is missing.
    """
    if simplejpeg is None:
        raise InputError(NEEDS_SIMPLEJPEG)
    try:
        frame = _without_metadata(data)
        colours = simplejpeg.decode_jpeg_header(frame)[2]
        simplejpeg.decode_jpeg(frame, "CMYK" if colours in ("CMYK", "YCCK") else "GRAY", min_factor=8)
    except ValueError as error:  # simplejpeg's only one
        return str(error)
    return hole_of_zeros(data)


def hole_of_zeros(data: bytes) -> str | None:
    """Where the pixels' data have a hole that a download or a copy left; None where they have none.

    libjpeg decodes zeros to something, and need not notice. As data they are a flat area at most, and that only where
    the shortest codes of the scan's Huffman tables stand for "as before" and "end of block".
    """
    if _HOLE not in data:
        return None
    tables: dict[int, int] = {}
    sequential = False
    for segment in _segments(data):
        if segment.marker in _FRAMES:
            sequential = segment.marker in _SEQUENTIAL
        if segment.marker == _DHT:
            tables.update(_symbols_of_zeros(segment.payload))
        suspect = segment.marker == _SOS and _HOLE in segment.scan
        if suspect and not _zeros_are_flat(segment.payload, tables, sequential=sequential):
            return f"{len(_HOLE)} or more bytes of the pixels' data are zeros"
    return None


def _segments(data: bytes) -> Iterator[_Segment]:
    """As libjpeg finds them: bytes between two segments are passed over. Ends at the EOI marker, which is one too."""
    at = 2
    while (found := _MARKER.search(data, at)) is not None:
        marker, at = found[1][0], found.end()
        if marker == _EOI:
            yield _Segment(marker, b"", b"")
            return
        if marker in _ALONE:
            continue
        length = data[at : at + 2]
        end = at + int.from_bytes(length, "big")
        payload = data[at + 2 : end]
        if marker == _SOS:
            behind = _SCAN_END.search(data, end)
            at = len(data) if behind is None else behind.start()
            yield _Segment(marker, length, payload, data[end:at])
        else:
            at = max(end, at)  # a length of 0 must not lead back
            yield _Segment(marker, length, payload)


def _without_metadata(data: bytes) -> bytes:
    """The file without what does not decide whether it is whole, so that libjpeg's warnings are of its pixels only."""
    parts, sequential = [data[:2]], False
    for segment in _segments(data):
        payload = segment.payload
        if segment.marker in _METADATA:
            continue
        if segment.marker in _FRAMES:
            sequential = segment.marker in _SEQUENTIAL
        if segment.marker == _SOS and sequential:  # other values are ignored, with a warning that would hide the next
            payload = payload[:-3] + _WHOLE_BLOCK
        parts += [bytes((0xFF, segment.marker)), segment.length, payload, segment.scan]
    return b"".join(parts)


def _symbols_of_zeros(payload: bytes) -> Iterator[tuple[int, int]]:
    """Of each table in a DHT segment its class and number, and the symbol of its first code, which is all zeros."""
    at = 0
    while at + 17 < len(payload):
        yield payload[at], payload[at + 17]
        at += 17 + sum(payload[at + 1 : at + 17])


def _zeros_are_flat(sos: bytes, tables: dict[int, int], *, sequential: bool) -> bool:
    """Whether a run of zero bits in this scan may be blocks like the one before."""
    components = sos[0] if sos else 0
    first, _, bits = (sos + bytes(4))[1 + 2 * components :][:3]
    if not sequential and bits >> 4:  # a refinement: bits that were left out before, whatever they are
        return True
    selectors = sos[2 : 2 + 2 * components : 2]
    dc = [tables.get(selector >> 4, 0) for selector in selectors] if sequential or not first else []
    ac = [tables.get(0x10 | selector & 15, 0) for selector in selectors] if sequential or first else []
    return not any(dc) and not any(symbol & 15 or symbol == _ZRL for symbol in ac)
