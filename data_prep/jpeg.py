"""Detects incomplete JPEGs, which decoders accept: missing data is silently filled with grey.

libjpeg's warnings about pixel data are faults, those about what surrounds it are not (docs/stream.md, "Decoding").
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.errors import InputError

try:
    import simplejpeg
except ImportError:  # reported when a JPEG is read
    simplejpeg = None

JPEG_MAGIC = b"\xff\xd8\xff"
NEEDS_SIMPLEJPEG = "JPEGs need simplejpeg, which reports damage in them: pip install simplejpeg"

_HOLE = bytes(256)  # half a sector: an interrupted download or copy leaves zeros in multiples of sectors

_EOI, _SOS, _DHT = 0xD9, 0xDA, 0xC4
_SEQUENTIAL = {0xC0, 0xC1}
_FRAMES = {*range(0xC0, 0xD0)} - {_DHT, 0xC8, 0xCC}
_METADATA = {*range(0xE0, 0xF0), 0xFE}
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment
_WHOLE_BLOCK = bytes((0, 63, 0))  # first and last coefficient, and bits: the only values in a sequential JPEG
_ZRL = 0xF0  # sixteen zero coefficients, within a block

_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SCAN_END = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


@dataclass(frozen=True)
class _Segment:
    """A segment, its payload without its length; `scan`: the entropy-coded data after an SOS, with restart markers."""

    marker: int
    length: bytes
    payload: bytes
    scan: bytes = b""


def jpeg_fault(data: bytes) -> str | None:
    """The fault of a damaged or incomplete JPEG file, in libjpeg's words where there are any; None if it is whole.

    Decodes all data, at an eighth of the resolution. Raises InputError where simplejpeg is missing.
    """
    if simplejpeg is None:
        raise InputError(NEEDS_SIMPLEJPEG)
    try:
        frame = _without_metadata(data)
        colours = simplejpeg.decode_jpeg_header(frame)[2]
        simplejpeg.decode_jpeg(frame, "CMYK" if colours in ("CMYK", "YCCK") else "GRAY", min_factor=8)
    except ValueError as error:  # the only type raised by simplejpeg
        return str(error)
    return hole_of_zeros(data)


def hole_of_zeros(data: bytes) -> str | None:
    """The fault of a JPEG with a run of zeros in its pixel data, as an interrupted download or copy leaves it, or None.

    libjpeg decodes zeros to something, possibly without a warning. In an intact file a run of zeros is at most a flat
    area, and only where the shortest codes of the scan's Huffman tables mean "as before" and "end of block".
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
    """The segments as libjpeg finds them, up to and with the EOI marker; bytes between segments are skipped."""
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
            at = max(end, at)  # progress even for a length of 0
            yield _Segment(marker, length, payload)


def _without_metadata(data: bytes) -> bytes:
    """The file without segments that are irrelevant to completeness, so that libjpeg warns about pixel data only."""
    parts, sequential = [data[:2]], False
    for segment in _segments(data):
        payload = segment.payload
        if segment.marker in _METADATA:
            continue
        if segment.marker in _FRAMES:
            sequential = segment.marker in _SEQUENTIAL
        if segment.marker == _SOS and sequential:  # libjpeg's warning would hide the next
            payload = payload[:-3] + _WHOLE_BLOCK
        parts += [bytes((0xFF, segment.marker)), segment.length, payload, segment.scan]
    return b"".join(parts)


def _symbols_of_zeros(payload: bytes) -> Iterator[tuple[int, int]]:
    """For each table in a DHT segment its class and number, and the symbol of its first code, which is all zeros."""
    at = 0
    while at + 17 < len(payload):
        yield payload[at], payload[at + 17]
        at += 17 + sum(payload[at + 1 : at + 17])


def _zeros_are_flat(sos: bytes, tables: dict[int, int], *, sequential: bool) -> bool:
    """Whether a run of zero bits in this scan may encode blocks equal to the one before."""
    components = sos[0] if sos else 0
    first, _, bits = (sos + bytes(4))[1 + 2 * components :][:3]
    if not sequential and bits >> 4:  # a refinement scan: arbitrary bits
        return True
    selectors = sos[2 : 2 + 2 * components : 2]
    dc = [tables.get(selector >> 4, 0) for selector in selectors] if sequential or not first else []
    ac = [tables.get(0x10 | selector & 15, 0) for selector in selectors] if sequential or first else []
    return not any(dc) and not any(symbol & 15 or symbol == _ZRL for symbol in ac)
