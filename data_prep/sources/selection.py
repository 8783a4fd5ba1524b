"""Selects images, split and labels from the names of all files of a folder or an archive."""

import hashlib
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from data_prep.format import UNLABELLED
from data_prep.sources.base import Wanted, classes_of_values, labels_from_folders
from data_prep.sources.label_files import (
    JSON_NAME,
    METADATA_NAMES,
    UnreadableError,
    Value,
    listed_captions,
    listed_labels,
    values_of,
)
from data_prep.sources.members import Further, members_beside
from data_prep.sources.rules import MASK, has_image_suffix, masks_among, parts_of, rule_against
from data_prep.sources.splits import Split, chosen_of, splits_of_images

Read = Callable[[int], bytes | None]


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """Class names, and the label of each image; `file`: position and sha256 of the label file.

    `notices` are lines for the user.
    """

    classes: list[str] = field(default_factory=list)
    labels: list[int]
    file: tuple[int, str] | None = None
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The selected images, as positions among all names, with labels and further members; what rules left out."""

    positions: list[int]
    labelling: Labelling
    further: Further[int]
    left_out: Counter[str]
    notices: list[str]


def select(
    names: Sequence[str], wanted: Wanted, where: str, read: Read, *, shards: frozenset[str] = frozenset()
) -> Selection:
    """Select images among `names`: paths with `/` relative to the top, or "" for an entry that is no valid path.

    where: the source, for messages; read: returns the content of a file by position, None where it is too large or no
    regular file; shards: folders that are parts of a download and no classes. Raises InputError where the requested
    split does not exist, or labels cannot be read.
    """
    masks = masks_among(names)
    rules = [MASK if name in masks else rule_against(name) for name in names]
    beside = members_beside(names, rules, wanted) if wanted.labels == "auto" else {}
    further = {position for of_images in beside.values() for position in of_images.values()}
    positions = [position for position, rule in enumerate(rules) if rule is None and position not in further]
    left_out = Counter(rule for position, rule in enumerate(rules) if rule and position not in further)
    pool = [names[position] for position in positions]
    splits, depth = _splits(pool)
    chosen = chosen_of(splits, wanted.split, where)
    if chosen is not None:
        positions = [positions[i] for i in chosen]
        others = [split for split in splits if split != wanted.split]
        left_out.update(f"images of split {split}" if split else "images outside the splits" for split in others)
    labelling = Labelling(labels=[UNLABELLED] * len(positions))
    columns: dict[str, list[int | bytes | None]] = {
        name: [of_images.get(position) for position in positions] for name, of_images in beside.items() if of_images
    }
    notices = _split_notices(splits, chosen)
    if wanted.labels == "auto":
        listed, faults = _listed(names, positions, where, read)
        labelling = listed or _by_folders([names[position] for position in positions], pool, depth, shards)
        notices += [*faults, *labelling.notices]
        captions, notice = _captions(names, positions, wanted.caption_column, where, read)
        notices += [notice] if notice and notice not in notices else []
        columns["txt"] = [of or listed for of, listed in zip(columns.get("txt", captions), captions)]
    return Selection(
        positions=positions, labelling=labelling, further=Further(columns), left_out=left_out, notices=notices
    )


def _splits(pool: Sequence[str]) -> tuple[list[Split | None], int]:
    """The split of each name, determined from the images; see `splits_of_images`. The depth is 0 for a single split."""
    images = [name for name in pool if has_image_suffix(name)]
    splits, depth = splits_of_images(images)
    if len(images) < len(pool):
        of_image = dict(zip(images, splits))
        of_folder = {parts_of(name)[:depth]: split for name, split in of_image.items()} if depth else {}
        splits = [of_image.get(name) or of_folder.get(parts_of(name)[:depth]) for name in pool]
    return splits, depth if len({split for split in splits if split}) > 1 else 0


def _split_notices(splits: Sequence[Split | None], chosen: list[int] | None) -> list[str]:
    counts = Counter(split for split in splits if split)
    told = ", ".join(f"{split} {count}" for split, count in sorted(counts.items()))
    if chosen is not None:
        return [f"reads {len(chosen)} images, for the names of folders or files tell splits: {told}; see --split"]
    return [f"reads all splits: {told}"] if len(counts) > 1 else []


def _listed(
    names: Sequence[str], positions: Sequence[int], where: str, read: Read
) -> tuple[Labelling | None, list[str]]:
    """Labels from the label file nearest to the images, in a folder that contains all of them.

    The second value has a line for each damaged label file.
    """
    chosen = [names[position] for position in positions]
    faults: list[str] = []
    for folder, position, data in _label_files(names, chosen, (JSON_NAME, *METADATA_NAMES), read):
        place = f"{where}: {names[position]}"
        try:
            listed = listed_labels(PurePosixPath(names[position]).name, data, place)
        except UnreadableError as error:
            faults.append(str(error))
            continue
        if listed is not None:
            values, notice = _matched(listed, names, chosen, folder, place)
            classes, labels = classes_of_values(values)
            file = (position, hashlib.sha256(data).hexdigest())
            return Labelling(classes=classes, labels=labels, file=file, notices=[notice] if notice else []), faults
    return None, faults


def _captions(
    names: Sequence[str], positions: Sequence[int], column: str | None, where: str, read: Read
) -> tuple[list[int | bytes | None], str | None]:
    """The caption of each image from the nearest metadata file that has some, and a line as of `values_of`.

    Damaged files are reported by `_listed`.
    """
    chosen = [names[position] for position in positions]
    for folder, position, data in _label_files(names, chosen, METADATA_NAMES, read):
        place = f"{where}: {names[position]}"
        with suppress(UnreadableError):
            listed = listed_captions(PurePosixPath(names[position]).name, data, column, place)
            if listed:
                values, notice = _matched(listed, names, chosen, folder, place)
                return [value.encode() if isinstance(value, str) else None for value in values], notice
    return [None] * len(positions), None


def _matched(
    listed: Mapping[str, Value], names: Sequence[str], chosen: Sequence[str], folder: str, place: str
) -> tuple[list[Value], str | None]:
    """`values_of` for a file in `folder`."""
    below = [name[len(folder) :] for name in names if name.startswith(folder)]
    return values_of(listed, below, [name[len(folder) :] for name in chosen], place)


def _label_files(
    names: Sequence[str], chosen: Sequence[str], wanted: Sequence[str], read: Read
) -> Iterator[tuple[str, int, bytes]]:
    """Folder, position and content of the files called one of `wanted`, the nearest first.

    The folder ends with a slash or is empty. Names that occur several times in an archive are excluded as ambiguous.
    """
    found = [(name, position) for position, name in enumerate(names) if name.endswith(tuple(wanted))]
    images = [name for name in chosen if has_image_suffix(name)] or chosen
    if not found or not images:
        return
    often = Counter(name for name, _ in found)
    folder = posixpath.commonpath([posixpath.dirname(min(images)), posixpath.dirname(max(images))])
    while True:
        prefix = f"{folder}/" if folder else ""
        for name in wanted:
            for path, position in found:
                if path == prefix + name and often[path] == 1 and (data := read(position)) is not None:
                    yield prefix, position, data
        if not folder:
            return
        folder = posixpath.dirname(folder)


def _by_folders(chosen: Sequence[str], pool: Sequence[str], depth: int, shards: frozenset[str]) -> Labelling:
    """Labels from folders, with the same classes in each split."""
    among: list[str] | None = None
    if depth:
        parts = [parts_of(name) for name in pool if has_image_suffix(name)]
        flat = {each[:depth] for each in parts if len(each) <= depth + 1}  # ImageNet's val has no class folders
        among = [_without(each, depth) for each in parts if each[:depth] not in flat]
        chosen = [_without(parts_of(name), depth) for name in chosen]
    classes, labels = labels_from_folders(chosen, among)
    if classes and shards.issuperset(classes):
        return Labelling(labels=[UNLABELLED] * len(chosen))
    return Labelling(classes=classes, labels=labels)


def _without(parts: tuple[str, ...], depth: int) -> str:
    """A path without the folder of its split."""
    return "/".join(parts[: depth - 1] + parts[depth:])
