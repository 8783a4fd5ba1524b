"""One planned shard: its sources -> a tar file, and a staged result that says the tar is whole."""

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from data_prep.convert import Member, convert
from data_prep.errors import Reject
from data_prep.format import ShardRecord, member_name, sha256_of
from data_prep.output import whole_file
from data_prep.recipe import Recipe
from data_prep.sources import Source


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Shard `number` holds the sources from `first_key` on; it depends on no other shard."""

    number: int
    first_key: int
    source: Source

    @property
    def tar_name(self) -> str:
        """File name of the shard in the dataset folder."""
        return f"shard-{self.number:06d}.tar"

    @property
    def result_name(self) -> str:
        """File name of its result in the staging folder."""
        return f"shard-{self.number:06d}.json"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One member of a tar: the fields of INDEX_DTYPE, the source's name and size, and whether its bytes were kept."""

    key: int
    offset: int
    length: int
    crc32: int
    label: int
    name: str
    width: int
    height: int
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """One source that is in no tar, and why."""

    name: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What became of a shard's sources. `record` is None where all were rejected: then there is no tar."""

    record: ShardRecord | None
    samples: list[Sample]
    rejects: list[Rejected]

    @property
    def sources(self) -> int:
        """How many were read."""
        return len(self.samples) + len(self.rejects)


def write_shard(plan: ShardPlan, recipe: Recipe, out: Path, staging: Path) -> int:
    """Write the tar, then its result, so that a result on the disk means a whole tar; return the number of sources.

    Raises DataPrepError where either cannot be written, and InputError where the source fails as a whole.
    """
    rejects: list[Rejected] = []
    samples: list[Sample] = []
    record = None
    members = _members(plan, recipe, rejects)
    first = next(members, None)
    if first is not None:
        tar_path = out / plan.tar_name
        with whole_file(tar_path, staging) as stream:
            samples = _write_tar(stream, chain([first], members), plan)
        record = ShardRecord(
            name=plan.tar_name, samples=len(samples), bytes=tar_path.stat().st_size, sha256=sha256_of(tar_path)
        )
    result = ShardResult(record=record, samples=samples, rejects=rejects)
    with whole_file(staging / plan.result_name, staging) as stream:
        stream.write(json.dumps(asdict(result)).encode())
    return result.sources


def load_result(plan: ShardPlan, out: Path, staging: Path) -> ShardResult | None:
    """The result of a shard that is whole already, or None where it is still to be written."""
    path = staging / plan.result_name
    if not path.exists():
        return None
    raw = json.loads(path.read_text())
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


def _members(plan: ShardPlan, recipe: Recipe, rejects: list[Rejected]) -> Iterator[tuple[int, Member]]:
    """Position in the plan's source and member of each image that is good; the others are added to `rejects`."""
    for i, name in enumerate(plan.source.names):
        try:
            yield i, convert(plan.source.read(i), recipe)
        except Reject as reject:
            rejects.append(Rejected(name=name, reason=reject.reason, detail=reject.detail))


def _write_tar(stream: BinaryIO, members: Iterable[tuple[int, Member]], plan: ShardPlan) -> list[Sample]:
    """Write USTAR members whose headers depend on nothing but position and content."""
    samples = []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, member in members:
            key = plan.first_key + i
            header = tarfile.TarInfo(member_name(key, member.extension))  # mtime, uid and gid are 0 unless set
            header.size = len(member.data)
            offset = stream.tell() + tarfile.BLOCKSIZE
            tar.addfile(header, io.BytesIO(member.data))
            samples.append(
                Sample(
                    key=key,
                    offset=offset,
                    length=len(member.data),
                    crc32=zlib.crc32(member.data),
                    label=plan.source.label(i),
                    name=plan.source.names[i],
                    width=member.width,
                    height=member.height,
                    kept=member.kept,
                )
            )
    return samples
