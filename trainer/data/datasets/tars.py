"""WebDataset tars without a manifest: their headers are read once, and the index is kept; see docs/stream.md."""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from data_prep.format import MEMBERS, UNLABELLED, sha256_of
from data_prep.progress import WorkProgress
from data_prep.sources.rules import IMAGE_SUFFIXES
from data_prep.tar_headers import Member, TarError, walk
from trainer.data.datasets.dataset import MEMBER_OF, Shard, ShardFiles
from trainer.data.datasets.indexed import IndexedDataset, StoredImages
from trainer.errors import ConfigError, DataError

TAR_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte
        ("length", "<u4"),
        ("label", "<i4"),  # from the sample's .cls, or UNLABELLED
        ("name", "<u8"),  # first 8 bytes of the sha256 of the member's name
    ]
)
_IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")


class TarDataset(IndexedDataset):
    """The images of tars that were not written by data_prep, cropped to the centre square when loaded.

    shards: with `samples` = 0, since their numbers are not known yet; image_size and mode: what every image must have
    (the shorter side) or is converted to (grey to RGB); index_folder: where the index is kept for the next start, None
    for nowhere; cond: see `IndexedDataset`. Raises DataError with shard and offset where a tar is damaged, and
    ConfigError where no sample has what `cond` names.
    """

    def __init__(
        self,
        where: str,
        shards: Sequence[Shard],
        *,
        image_size: int,
        mode: str,
        files: ShardFiles,
        index_folder: Path | None,
        cond: Sequence[str] = (),
    ) -> None:
        dtype = _dtype(cond)
        if index_folder is None:
            counts, index = _index(shards, files, dtype)
            source: Path | npt.NDArray[np.void] = index
        else:
            counts, source = _kept_index(shards, files, index_folder, dtype)
            index = np.load(source, mmap_mode="r", allow_pickle=False)
        if not sum(counts):
            raise DataError(f"{where}: no image in {len(shards)} tars")
        for name in cond:
            if not (index["label"] != UNLABELLED if name == "label" else index[MEMBER_OF[name]]["offset"]).any():
                raise ConfigError(f"data.cond = {list(cond)}: no sample in {where} has a {name}")
        names = [PurePosixPath(shard.url).name for shard in shards]
        content = [image_size, mode, names, counts, hashlib.sha256(index.tobytes()).hexdigest()]
        super().__init__(
            where=where,
            shards=[replace(shard, samples=count) for shard, count in zip(shards, counts)],
            index=source,
            stored=StoredImages(image_size=image_size, mode=mode, crop=True),
            fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            files=files,
            cond=cond,
        )

    @override
    def key(self, sample: int) -> str:
        """The hash of its image's name in hexadecimal digits, since the index does not store names."""
        return f"{self.index[sample]['name']:016x}"

    @override
    def describe(self, sample: int) -> str:
        """Location of a sample; its name is read from the tar, since the index does not store names."""
        shard = int(self.shards_of(sample))
        offset = int(self.index[sample]["offset"])
        try:
            names = {member.offset: member.name for member in walk(self._descriptor(shard))}
        except TarError:
            names = {}
        return f"{self.shards[shard].url}: member {names.get(offset, f'at offset {offset}')} (sample {sample})"

    @override
    def split_keys(self) -> npt.NDArray[np.uint64]:
        """Hashes of the members' names."""
        return self.index["name"].astype(np.uint64)


def _dtype(cond: Sequence[str]) -> np.dtype[np.void]:
    """Of the index: TAR_DTYPE, and for each further member that is asked for its place, zeros where there is none."""
    members = [MEMBER_OF[name] for name in cond if name != "label"]
    return np.dtype([*TAR_DTYPE.descr, *((member, TAR_DTYPE[["offset", "length"]]) for member in members)])


def _kept_index(
    shards: Sequence[Shard], files: ShardFiles, folder: Path, dtype: np.dtype[np.void]
) -> tuple[list[int], Path]:
    """The stored index, or a new one: one process reads the headers while others wait for it.

    It is keyed by the shards' names, sizes and times, so that a changed shard results in a new index, and by further
    members.
    """
    keyed_by: list[list[object]] = [[s.url, s.bytes, s.digest] for s in shards]
    keyed_by += [list(dtype.names or ())] if dtype != TAR_DTYPE else []
    key = hashlib.sha256(json.dumps(keyed_by).encode()).hexdigest()[:32]
    path, record = folder / f"{key}.npy", folder / f"{key}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        counts = _counts_kept(path, record)
        if counts is None:
            counts, index = _index(shards, files, dtype)
            _replace(path, lambda stream: np.save(stream, index))
            content = json.dumps({"counts": counts, "sha256": _digest(path, counts)}).encode()
            _replace(record, lambda stream: stream.write(content))
    return counts, path


def _counts_kept(path: Path, record: Path) -> list[int] | None:
    """Number of samples of each shard; None where index and record are missing or do not match."""
    try:
        kept = json.loads(record.read_text())
        counts = [int(count) for count in kept["counts"]]
        return counts if kept["sha256"] == _digest(path, counts) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path, counts: Sequence[int]) -> str:
    return hashlib.sha256(f"{sha256_of(path)} {list(counts)}".encode()).hexdigest()


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(path)


def _index(
    shards: Sequence[Shard], files: ShardFiles, dtype: np.dtype[np.void]
) -> tuple[list[int], npt.NDArray[np.void]]:
    """Read the headers of all shards. Returns the number of samples of each, and the index, (N,) of `dtype`.

    Reports the images and labels that are left out, one line each: no other process or start does.
    """
    parts, left_out, without_number = [], [], []
    with WorkProgress(total=len(shards), what="indexing", unit="tar") as progress:
        for shard in shards:
            descriptor = files.open(shard)
            try:
                rows, others, words = _samples(descriptor, walk(descriptor), dtype)
                parts.append(rows)
                left_out += [f"{shard.url}: {name}" for name in others]
                without_number += [f"{shard.url}: {name}" for name in words]
            except TarError as error:
                raise DataError(f"{shard.url}: {error}; restore it or leave it out") from error
            except (ValueError, OverflowError) as error:
                raise DataError(f"{shard.url}: {error}") from error
            finally:
                os.close(descriptor)
            progress.update()
    if left_out:
        count = f"{len(left_out)} images are" if len(left_out) > 1 else "an image is"
        print(
            f"{left_out[0]}: {count} left out; JPEG, PNG and WebP are read that are files of their own in the tar "
            "(data_prep reads more)",
            file=sys.stderr,
        )
    if without_number:
        count = f"{len(without_number)} labels are" if len(without_number) > 1 else "a label is"
        print(f"{without_number[0]}: {count} no class numbers and left out (data_prep reads words)", file=sys.stderr)
    return [len(part) for part in parts], np.concatenate([np.empty(0, dtype), *parts])


def _samples(
    descriptor: int, members: Sequence[Member], dtype: np.dtype[np.void]
) -> tuple[npt.NDArray[np.void], list[str], list[str]]:
    """WebDataset's grouping: a sample is all members of one name up to the first dot; its image is .jpg, .png, ...

    Images that this rule would drop (`a.1.jpg` and `a.2.jpg`) are samples of their own. Returns the rows of the index,
    the names of images that are still left out, and the names of `.cls` members without a number.
    """
    samples: dict[str, dict[str, Member]] = {}
    left_out: list[str] = []
    without_number: list[str] = []
    for member in members:
        folder, _, base = member.name.rpartition("/")
        key, _, extension = base.partition(".")
        if base.startswith(".") or member.kind == "folder":  # for example macOS's ._ files
            continue
        if member.kind != "file":
            left_out += [member.name] if _is_image(extension) else []
            continue
        fields = samples.setdefault(f"{folder}/{key}", {})
        if extension.lower() in fields:
            raise ValueError(f"{member.name} is there twice")
        fields[extension.lower()] = member
    rows = []
    wanted = (dtype.names or ())[len(TAR_DTYPE.names or ()) :]
    for fields in samples.values():
        label = _label(descriptor, fields["cls"]) if "cls" in fields else UNLABELLED
        if label is None:
            without_number.append(fields["cls"].name)
            label = UNLABELLED
        images = _images(descriptor, fields)
        if not images:
            left_out += [member.name for extension, member in fields.items() if _is_image(extension)]
        for image in images:
            name = int.from_bytes(hashlib.sha256(image.name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
            rows.append((image.offset, image.length, label, name, *(_place(fields, member) for member in wanted)))
    return np.array(rows, dtype=dtype), left_out, without_number


def _place(fields: dict[str, Member], name: str) -> tuple[int, int]:
    """Offset and length of a further member, by its name in data_prep.format.MEMBERS; zeros where there is none.

    Raises ValueError where there are several.
    """
    extensions = [f"{name}.{kind}" for kind in sorted(_IMAGE_EXTENSIONS)] if MEMBERS[name] == "image" else [name]
    found = [fields[extension] for extension in extensions if extension in fields]
    if len(found) > 1:
        raise ValueError(f"{found[0].name} and {found[1].name} are both {name} of one sample")
    return (found[0].offset, found[0].length) if found else (0, 0)


def _is_image(extension: str) -> bool:
    """Whether the part of a name after its first dot is that of an image."""
    return f".{extension.lower().rpartition('.')[2]}" in IMAGE_SUFFIXES | {".heic"}


def _images(descriptor: int, fields: dict[str, Member]) -> list[Member]:
    exact = [member for extension, member in fields.items() if extension in _IMAGE_EXTENSIONS]
    if len(exact) > 1:
        raise ValueError(f"{exact[0].name} and {exact[1].name} are images of one sample")
    if exact:
        return exact
    dotted = [member for extension, member in fields.items() if extension.rpartition(".")[2] in _IMAGE_EXTENSIONS]
    if dotted or "" not in fields:
        return dotted
    bare = fields[""]
    return [bare] if os.pread(descriptor, 8, bare.offset).startswith(_IMAGE_MAGIC) else []


def _label(descriptor: int, member: Member) -> int | None:
    """The number in a `.cls`; None where it holds none, or one that is no valid class."""
    text = os.pread(descriptor, min(member.length, 32), member.offset)
    try:
        label = int(text)
    except ValueError:
        return None
    return label if abs(label) <= np.iinfo(np.int32).max else None
