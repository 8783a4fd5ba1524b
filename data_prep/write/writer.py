"""Writes one planned shard: from its sources to a tar file, and a result that marks the tar as complete."""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.errors import DataPrepError, Reject
from data_prep.format import ShardRecord, crc32, member_name, sha256_of
from data_prep.output import whole_file
from data_prep.recipe import Recipe
from data_prep.sources import Source
from data_prep.write.convert import EncodedImage, convert
from data_prep.write.images import pillow_is_quiet
from data_prep.write.members import stored

Further = Mapping[str, tuple[str, bytes]]  # extension and bytes of a sample's further members, by name

NAMELESS_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
SIZE_FIELD, CHECKSUM_FIELD = slice(124, 136), slice(148, 156)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Shard `number` with the sources from `first_key` on; independent of other shards.

    members: as `Manifest.members`.
    """

    number: int
    first_key: int
    source: Source
    members: dict[str, int]

    @property
    def tar_name(self) -> str:
        """File name of the shard in the dataset folder."""
        return f"shard-{self.number:06d}.tar"

    @property
    def result_name(self) -> str:
        """File name of the shard's result in the staging folder."""
        return f"shard-{self.number:06d}.json"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample of a tar: the fields of INDEX_DTYPE, the source's name and size, whether the image's bytes were kept,
    and by name the MEMBER_DTYPE of each further member.
    """

    key: int
    offset: int
    length: int
    crc32: int
    label: int
    name: str
    width: int
    height: int
    kept: bool
    further: dict[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A source that was rejected, and the reason."""

    name: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """Result of a shard's sources. `record` is None where all were rejected: then there is no tar."""

    record: ShardRecord | None
    samples: list[Sample]
    rejects: list[Rejected]

    @property
    def sources(self) -> int:
        """Number of sources read."""
        return len(self.samples) + len(self.rejects)

    def to_dict(self) -> dict[str, Any]:
        """As for JSON; `asdict` would copy each field of each sample, which costs a tenth of the time for a JPEG."""
        return {
            "record": self.record and vars(self.record),
            "samples": [vars(sample) for sample in self.samples],
            "rejects": [vars(rejected) for rejected in self.rejects],
        }


def write_shard(plan: ShardPlan, recipe: Recipe, out: Path, staging: Path) -> int:
    """Write the tar, then its result: a result on disk implies a complete tar. Returns the number of sources.

    Raises DataPrepError where either cannot be written, and InputError where the source as a whole fails.
    """
    rejects: list[Rejected] = []
    samples: list[Sample] = []
    record = None
    converted = _converted(plan, recipe, rejects)
    with pillow_is_quiet():
        first = next(converted, None)
    if first is not None:
        with whole_file(out / plan.tar_name, staging) as stream, pillow_is_quiet():
            tar = HashedStream(stream)
            samples = _write_tar(tar, chain([first], converted), plan)
        record = ShardRecord(name=plan.tar_name, samples=len(samples), bytes=tar.size, sha256=tar.digest.hexdigest())
    result = ShardResult(record=record, samples=samples, rejects=rejects)
    content = json.dumps(result.to_dict()).encode()
    with whole_file(staging / plan.result_name, staging) as stream:
        stream.write(_digest_line(content) + content)
    return result.sources


def load_result(plan: ShardPlan, out: Path, staging: Path) -> ShardResult | None:
    """The result of a shard that was written already, or None.

    Only the size of the tar is checked; see `is_whole`.
    """
    path = staging / plan.result_name
    if not path.exists():
        return None
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest + b"\n" != _digest_line(content):
        return None
    raw = json.loads(content)
    record = None if raw["record"] is None else ShardRecord(**raw["record"])
    if record is not None:
        tar_path = out / record.name
        if not tar_path.is_file() or tar_path.stat().st_size != record.bytes:
            return None
    return ShardResult(
        record=record,
        samples=[Sample(**sample) for sample in raw["samples"]],
        rejects=[Rejected(**rejected) for rejected in raw["rejects"]],
    )


def is_whole(plan: ShardPlan, out: Path, staging: Path) -> bool:
    """Whether a shard exists and its bytes are unchanged. Raises DataPrepError where the disk fails."""
    result = load_result(plan, out, staging)
    if result is None or result.record is None:
        return result is not None
    try:
        return sha256_of(out / result.record.name) == result.record.sha256
    except OSError as error:
        raise DataPrepError(
            f"{out / result.record.name}: cannot be read ({error.strerror}); remove it and run again"
        ) from error


def _digest_line(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"


def _converted(plan: ShardPlan, recipe: Recipe, rejects: list[Rejected]) -> Iterator[tuple[int, EncodedImage, Further]]:
    """Position in the plan's source, image and further members of each valid sample; others are added to `rejects`."""
    for i, name in enumerate(plan.source.names):
        try:
            yield i, *convert_sample(plan, i, recipe)
        except Reject as reject:
            rejects.append(Rejected(name=name, reason=reject.reason, detail=reject.detail))


def convert_sample(plan: ShardPlan, i: int, recipe: Recipe) -> tuple[EncodedImage, Further]:
    """Image and further members of sample `i`. Raises Reject, InputError, and DataPrepError for want of memory."""
    try:
        image = convert(plan.source.read(i), recipe)
        if not plan.members:
            return image, {}
        return image, stored(plan.source.further(i), plan.source.label(i), plan.members, recipe)
    except MemoryError as error:
        raise DataPrepError(
            f"{plan.source.names[i]}: not enough memory for this image; run again to go on from here, with fewer "
            "--workers"
        ) from error


class HashedStream:
    """Writes to `stream`, and counts and hashes (sha256) what was written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Write all of `data`."""
        self._stream.write(data)
        self.digest.update(data)
        self.size += len(data)


def _write_tar(
    tar: HashedStream, converted: Iterable[tuple[int, EncodedImage, Further]], plan: ShardPlan
) -> list[Sample]:
    """Write USTAR members whose headers depend only on position and content."""
    samples = []
    for i, image, further in converted:
        key = plan.first_key + i
        offset, length, checksum = _write_member(tar, member_name(key, image.extension), image.data)
        sample = Sample(
            key=key,
            offset=offset,
            length=length,
            crc32=checksum,
            label=plan.source.label(i),
            name=plan.source.names[i],
            width=image.width,
            height=image.height,
            kept=image.kept,
            further={
                name: _write_member(tar, member_name(key, extension), data)
                for name, (extension, data) in further.items()
            },
        )
        samples.append(sample)
    tar.write(bytes(2 * tarfile.BLOCKSIZE))  # the end-of-archive mark,
    tar.write(bytes(-tar.size % tarfile.RECORDSIZE))  # and padding to a whole record
    return samples


def _write_member(tar: HashedStream, name: str, data: bytes) -> tuple[int, int, int]:
    """Write a file. Returns its offset, length and crc32."""
    offset = tar.size + tarfile.BLOCKSIZE
    tar.write(ustar_header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset, len(data), crc32(data)


def ustar_header(name: str, length: int) -> bytes:
    """The header that `tarfile` writes for a file with mtime, uid and gid of 0, in a tenth of the time.

    `name`: at most 100 ASCII characters.
    """
    header = bytearray(NAMELESS_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[SIZE_FIELD] = b"%011o\0" % length
    header[CHECKSUM_FIELD] = b" " * 8  # the checksum field counts as spaces in the sum
    header[CHECKSUM_FIELD] = b"%06o\0 " % sum(header)
    return bytes(header)
