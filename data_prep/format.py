"""The shard format: the single definition, used by data_prep for writing and by trainer for reading.

A dataset folder holds::

    shard-000000.tar ...   USTAR, samples as webdataset has them: members <key>.<extension>, the key in nine digits
    index.npy              index_dtype(Manifest.members), one row a sample, in shard order; made to be memory-mapped
    names.jsonl            one JSON string a line: the origin of the sample of that row
    rejects.jsonl          one object a line: {"name": ..., "reason": ..., "detail": ...}
    contact_sheet.png      some of the images, for visual inspection
    stats.npz              only after `python -m data_prep stats`; see data_prep/inspection/stats.py
    manifest.json          everything below in `Manifest`; written last, so a folder without it is unfinished

Where `Manifest.encoding` is "webp", "png" or "jpeg", it is every image's extension, and every image is `image_size` x
`image_size` pixels. Where it is "source", an image is a JPEG, PNG or WebP as it was found (or a lossless one made by
data_prep), with the extension jpg, png or webp of its own format; its shorter side is `image_size`, and the reader
crops it by `center_crop_box`. Either way a reader finds members by the index and needs no names.

Format 2 has the image alone. Format 3 has further members behind it, those of `Manifest.members` that the sample has:

    cls      the class in digits, as in the index
    txt      a caption, UTF-8
    npy      an array in numpy's format
    low, source    a second image (low.webp, source.jpg, ...), encoded and cropped as the first, of a side of its own

A dataset without further members is written in format 2, to the byte as before. It is a version, not a field of
format 2, since a reader of format 2 refuses another version in one clear line.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_origin

import numpy as np
import numpy.typing as npt

from data_prep.errors import InputError

try:
    # Not isal's, which is as fast: it leaves the processor's vector registers in a state that slows older instructions
    # down; libwebp's decoder then takes a sixth longer.
    from zlib_ng.zlib_ng import crc32 as crc32
except ImportError:  # zlib's: same values, a fifth of the speed
    from zlib import crc32 as crc32

FORMAT_VERSION = 2
FORMAT_WITH_MEMBERS = 3
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
NAMES_NAME = "names.jsonl"
REJECTS_NAME = "rejects.jsonl"
CONTACT_SHEET_NAME = "contact_sheet.png"
STATS_NAME = "stats.npz"
UNLABELLED = -1
CHANNELS = {"RGB": 3, "L": 1}  # of an image, by its mode
SOURCE_ENCODING = "source"

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in Manifest.shards
        ("offset", "<u8"),  # of the image's first byte in the tar (after the member's header)
        ("length", "<u4"),  # of the encoded image in bytes
        ("crc32", "<u4"),  # of the encoded image
        ("label", "<i4"),  # position in Manifest.classes, or UNLABELLED
        ("key", "<u4"),  # position in the sorted list of sources; also the member's name
    ]
)

MEMBER_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])  # zeros: the sample has none

Kind = Literal["class", "text", "array", "image"]
MEMBERS: dict[str, Kind] = {"cls": "class", "txt": "text", "npy": "array", "low": "image", "source": "image"}


def index_dtype(members: Iterable[str]) -> np.dtype[np.void]:
    """The type of the index's rows: INDEX_DTYPE, and a MEMBER_DTYPE for each of `members` by its name."""
    return np.dtype([*INDEX_DTYPE.descr, *((name, MEMBER_DTYPE) for name in members)])


class FormatError(InputError, ValueError):
    """A malformed dataset folder; the message has the file's name and what is expected."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """Name, size and content of one tar file as recorded in the manifest."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a dataset.

    `image_size` is the side in pixels; `mode` is Pillow's ("RGB" or "L"); `encoding` is "webp", "png", "jpeg" or
    "source" (see the module); `source` describes the input (kind, count of files, fingerprint, and that of further
    members), `transform` the resizing. `members` has the further members that samples may have, by name in their order
    in the tar, with the side in pixels for a second image and 0 for others. `options` are data_prep's further options
    that determine the bytes; readers do not need them, nor `report`, which is informative: "kept", the number of
    samples whose bytes are the source's; "shorter_sides", how many sources had a shorter side of {"256": 256..511, ...}
    pixels; and "left_out", the number of files that each rule excluded, where there are any.
    """

    image_size: int
    mode: str
    encoding: str
    transform: str
    samples: int
    rejected: int
    classes: list[str]
    source: dict[str, Any]
    shards: list[ShardRecord]
    index_sha256: str
    names_sha256: str
    options: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    members: dict[str, int] = field(default_factory=dict)

    @property
    def format_version(self) -> int:
        """2, or 3 where there are further members."""
        return FORMAT_WITH_MEMBERS if self.members else FORMAT_VERSION

    @property
    def channels(self) -> int:
        """Number of channels: 3 for RGB, 1 for L."""
        return CHANNELS[self.mode]

    @property
    def crops(self) -> bool:
        """Whether readers must crop decoded images by `center_crop_box`."""
        return self.encoding == SOURCE_ENCODING

    @property
    def fingerprint(self) -> str:
        """Identifies samples and numbering: datasets with equal fingerprints result in the same training run."""
        content = [self.image_size, self.mode, self.index_sha256, [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json."""
        content = asdict(self)
        members = content.pop("members")
        content["format_version"] = self.format_version
        return json.dumps(content | ({"members": members} if members else {}), indent=1) + "\n"


def load_manifest(folder: Path) -> Manifest:
    """Read `folder`/manifest.json.

    Raises FormatError where the folder or the manifest is missing, unreadable or of another version.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; make it with `python -m data_prep SRC {folder}`")
    if not path.is_file():
        raise FormatError(f"{path}: missing, so the dataset is unfinished; run data_prep again to complete it")
    try:
        raw = dict(json.loads(path.read_text()))
        version = raw.pop("format_version")
        if version not in (FORMAT_VERSION, FORMAT_WITH_MEMBERS):
            raise FormatError(
                f"{path}: format_version is {version}, this program reads {FORMAT_VERSION} and {FORMAT_WITH_MEMBERS}"
            )
        manifest = Manifest(**{**raw, "shards": [ShardRecord(**shard) for shard in raw["shards"]]})
        _check_types(manifest)
        if manifest.format_version != version:
            raise ValueError(f"format_version is {version}, with members {list(manifest.members)}")
        for shard in manifest.shards:
            _check_types(shard)
    except FormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: not a manifest ({type(error).__name__}: {error})") from error
    return manifest


def _check_types(part: Manifest | ShardRecord) -> None:
    """Raise TypeError or ValueError with the first field whose value does not match its annotation."""
    for each in fields(part):
        value, kind = getattr(part, each.name), get_origin(each.type) or each.type
        if type(value) is not kind:
            raise TypeError(f"{each.name} is {value!r}, which should be {getattr(kind, '__name__', kind)}")
        if kind is int and value < 0:
            raise ValueError(f"{each.name} is {value}, which cannot be negative")
    if isinstance(part, Manifest) and not all(isinstance(name, str) for name in part.classes):
        raise TypeError(f"classes is {part.classes!r}, which should be a list of str")
    if isinstance(part, Manifest) and (
        not part.members.keys() <= MEMBERS.keys()
        or any(type(side) is not int or side < 0 for side in part.members.values())
    ):
        raise ValueError(f"members is {part.members!r}, which should be sides of some of {', '.join(MEMBERS)}")
    if isinstance(part, Manifest) and part.mode not in CHANNELS:
        raise ValueError(f"mode is {part.mode!r}, which should be RGB or L")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise FormatError with the first file that is missing or differs; of shards only the sizes are compared."""
    check_shards(folder, manifest)
    check_digest(folder / INDEX_NAME, manifest.index_sha256)
    check_digest(folder / NAMES_NAME, manifest.names_sha256)


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Raise FormatError with the first shard that is missing or has another size, without reading any."""
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            raise FormatError(f"{path}: missing; the manifest lists {len(manifest.shards)} shards")
        if path.stat().st_size != shard.bytes:
            raise FormatError(f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}")


def check_digest(path: Path, expected: str) -> None:
    """Raise FormatError where the file is missing or its sha256 is not the manifest's."""
    if not path.is_file():
        raise FormatError(f"{path}: missing")
    if sha256_of(path) != expected:
        raise FormatError(f"{path}: sha256 differs from the manifest's; the file was changed or is stale")


def load_index(folder: Path, manifest: Manifest) -> npt.NDArray[np.void]:
    """The index, (samples,) of `index_dtype`, memory-mapped.

    Raises FormatError where it is missing or has another type; its rows are not checked.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FormatError(f"{path}: missing")
    try:
        index: npt.NDArray[np.void] = np.lib.format.open_memmap(path, mode="r")  # rejects pickles and .npz
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise FormatError(f"{path}: cannot be read as an index ({error}); prepare the dataset again") from error
    if index.dtype != index_dtype(manifest.members) or index.ndim != 1:
        raise FormatError(f"{path}: not an index ({index.ndim} axes of {index.dtype}); prepare the dataset again")
    return index


def checked_index(folder: Path, manifest: Manifest) -> npt.NDArray[np.void]:
    """Like `load_index`. Raises FormatError also where sha256, rows or their shards are not the manifest's."""
    index = load_index(folder, manifest)
    check_digest(folder / INDEX_NAME, manifest.index_sha256)
    counts = np.array([shard.samples for shard in manifest.shards], np.int64)
    ends = np.cumsum(counts)[counts > 0]
    rows = np.concatenate([ends - counts[counts > 0], ends - 1])  # the first and the last of each shard that has some
    expected = np.tile(np.flatnonzero(counts), 2)
    same_length = len(index) == manifest.samples == counts.sum()
    if not same_length or (index["shard"][rows] != expected).any():
        samples = f"{manifest.samples} samples in {len(manifest.shards)} shards"
        raise FormatError(f"{folder / INDEX_NAME}: is not of the manifest's {samples}; prepare the dataset again")
    return index


def center_crop_box(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """The centre square of `size` pixels, as (left, top, right, bottom) for `Image.crop`; halves are rounded down.

    The transforms of DDPM, ADM and EDM crop images with a shorter side of `size` in this way, and so do readers of
    source-encoded members. Raises FormatError where the shorter side differs.
    """
    if min(width, height) != size:
        raise FormatError(f"is {width}x{height}; its shorter side must be {size}")
    left, top = (width - size) // 2, (height - size) // 2
    return left, top, left + size, top + size


def member_name(key: int, extension: str) -> str:
    """Name of a sample's member in its tar."""
    return f"{key:09d}.{extension}"


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
