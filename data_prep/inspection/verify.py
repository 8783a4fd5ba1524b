"""Verification of a finished dataset: every byte is compared with manifest and index; one line per fault."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from data_prep.errors import InputError
from data_prep.format import (
    INDEX_NAME,
    NAMES_NAME,
    REJECTS_NAME,
    UNLABELLED,
    FormatError,
    check_digest,
    crc32,
    sha256_of,
)
from data_prep.inspection.dataset import Dataset, check_member, decode_member, member_bytes, opened, places_of
from data_prep.progress import WorkProgress
from data_prep.tar_headers import list_members

Decode = Literal["none", "sample", "all"]
DECODE: tuple[Decode, ...] = get_args(Decode)

DECODED_OF_A_SHARD = 16  # evenly spaced samples per shard, with decode "sample"


def verify(folder: Path, *, decode: Decode, workers: int) -> list[str]:
    """The faults of a dataset, each a line with the file's name; empty where there are none.

    Raises InputError where manifest or index is missing.
    """
    dataset = Dataset.open(folder, check_index=False)
    faults = [*_faults_of_lists(dataset), *_extra_shards(dataset)]
    shards = range(len(dataset.manifest.shards))
    with (
        ThreadPoolExecutor(workers) as pool,  # threads, since hashing and decoding release the GIL
        WorkProgress(total=dataset.manifest.samples, what="verifying", unit="img") as progress,
    ):
        for shard, found in zip(shards, pool.map(lambda shard: _faults_of_shard(dataset, shard, decode), shards)):
            faults += [f"{dataset.path_of(shard)}: {fault}" for fault in found]
            progress.update(dataset.manifest.shards[shard].samples)
    return faults


def _faults_of_lists(dataset: Dataset) -> Iterator[str]:
    """Faults of index, names and rejects."""
    folder, manifest, index = dataset.folder, dataset.manifest, dataset.index
    for name, expected in ((INDEX_NAME, manifest.index_sha256), (NAMES_NAME, manifest.names_sha256)):
        try:
            check_digest(folder / name, expected)
        except FormatError as error:
            yield str(error)
    if len(index) != manifest.samples:
        yield f"{folder / INDEX_NAME}: {len(index)} rows, the manifest says {manifest.samples}"
    if (np.diff(index["shard"].astype(np.int64)) < 0).any() or (np.diff(index["key"].astype(np.int64)) <= 0).any():
        yield f"{folder / INDEX_NAME}: its rows are not in the order of shards and keys"
    if ((index["label"] < UNLABELLED) | (index["label"] >= len(manifest.classes))).any():
        yield f"{folder / INDEX_NAME}: a label outside the manifest's {len(manifest.classes)} classes"
    yield from _faults_of_rejects(folder / REJECTS_NAME, manifest.rejected)


def _faults_of_rejects(path: Path, expected: int) -> Iterator[str]:
    try:
        found = sum(1 for line in path.read_text().splitlines() if json.loads(line)["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path}: cannot be read ({error})"
        return
    if found != expected:
        yield f"{path}: {found} lines, the manifest says {expected}"


def _extra_shards(dataset: Dataset) -> Iterator[str]:
    listed = {shard.name for shard in dataset.manifest.shards}
    for path in sorted(dataset.folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path}: not in the manifest; remove it"


def _faults_of_shard(dataset: Dataset, shard: int, decode: Decode) -> list[str]:
    """Faults of one tar: at most one of its bytes, and one of the index's entries for it."""
    record, path = dataset.manifest.shards[shard], dataset.path_of(shard)
    if not path.is_file():
        return [f"missing; the manifest lists {len(dataset.manifest.shards)} shards"]
    rows = dataset.rows_of(shard)
    digest = sha256_of(path)
    if digest != record.sha256:
        owner = next((other.name for other in dataset.manifest.shards if other.sha256 == digest), None)
        if owner is not None:
            return [f"holds what belongs into {owner}; put them back in their places"]
        return [f"sha256 differs from the manifest's: {_first_damage(dataset, shard, rows)}"]
    fault = _index_fault(path, rows) or _content_fault(dataset, path, rows, decode)
    return [] if fault is None else [fault]


def _first_damage(dataset: Dataset, shard: int, rows: npt.NDArray[np.void]) -> str:
    """The position of the first damage of a tar, as far as it can be located."""
    path, expected = dataset.path_of(shard), dataset.manifest.shards[shard].bytes
    if path.stat().st_size != expected:
        return f"{path.stat().st_size} bytes instead of {expected}"
    return _content_fault(dataset, path, rows, "none") or _index_fault(path, rows) or "in a header or padding"


def _index_fault(path: Path, rows: npt.NDArray[np.void]) -> str | None:
    """The first difference between the tar's headers and the index."""
    try:
        members = [(member.name, member.offset, member.length, member.kind) for member in list_members(path)]
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    indexed = [(row["key"], place) for row in rows for _, place in places_of(row)]
    if len(members) != len(indexed):
        return f"holds {len(members)} members, the index says {len(indexed)}"
    for (name, offset, length, kind), (number, place) in zip(members, indexed):
        key = f"{number:09d}"
        if kind != "file" or (name.split(".")[0], offset, length) != (key, place["offset"], place["length"]):
            expected = f"{key} at {place['offset']} with {place['length']}"
            return f"member {name} at {offset} with {length} bytes, the index says {expected}"
    return None


def _content_fault(dataset: Dataset, path: Path, rows: npt.NDArray[np.void], decode: Decode) -> str | None:
    """The first member whose bytes differ from the index, or which is no image of the manifest's kind."""
    wanted = {"none": 0, "sample": min(len(rows), DECODED_OF_A_SHARD), "all": len(rows)}[decode]
    decoded = set(np.linspace(0, len(rows) - 1, wanted).astype(int).tolist())
    with opened(path) as descriptor:
        for position, row in enumerate(rows):
            for name, place in places_of(row):
                data, member = member_bytes(descriptor, place), f"{row['key']:09d}" + (f".{name}" if name else "")
                if crc32(data) != place["crc32"]:
                    return f"member {member} is damaged (crc32 differs from the index)"
                if position in decoded:
                    try:
                        if name:
                            check_member(name, data, int(row["label"]), dataset.manifest)
                        else:
                            decode_member(data, dataset.manifest)
                    except FormatError as error:
                        return f"member {member} {error}"
    return None
