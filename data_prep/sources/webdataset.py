"""Grouping of a tar's members: in WebDataset all with the same name up to its first dot are one sample."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.format import MEMBERS
from data_prep.sources.base import Wanted, classes_of_values
from data_prep.sources.members import PAIR, Further
from data_prep.sources.reading import has_changed, read_at
from data_prep.sources.rules import BY_PRODUCT, MASK, SIDECAR, has_image_suffix, rule_against, stem_of, suffix_of
from data_prep.sources.selection import Labelling
from data_prep.tar_headers import Member, list_members

MAX_LABEL_BYTES = 1024**2
SECOND_IMAGES = tuple(name for name, kind in MEMBERS.items() if kind == "image")
LONGEST_WORD = 200  # characters of a class name; longer text is a caption


@dataclass(frozen=True, slots=True)
class ArchivedFile(Member):
    """A member of archive number `archive`."""

    archive: int


@dataclass(frozen=True, kw_only=True)
class Archive:
    """Content of an archive: candidate images, files with the same key as one, and what was left out.

    `fields` has labels and captions, and also the arrays and second images that are kept.
    """

    candidates: list[ArchivedFile]
    fields: dict[str, ArchivedFile]
    left_out: Counter[str]


def sorted_out(path: Path, archive: int, wanted: Wanted) -> Archive:
    """The members of archive number `archive`. Raises InputError where it is damaged or truncated.

    Every image is a candidate, so `a.1.jpg` and `a.2.jpg` are two; but beside `a.jpg`, `a.seg.png` is an auxiliary
    image of it, and `a.low.png`, `a.source.png` or one called `wanted.pair` its second one, as `a.npy` is its array.
    """
    kept = {wanted.pair if name == PAIR and wanted.pair else name for name in SECOND_IMAGES}
    kept = kept if wanted.labels == "auto" else set()
    members = [
        ArchivedFile(m.name, m.offset, m.length, m.kind, archive) for m in list_members(path) if m.kind != "folder"
    ]
    visible = [member for member in members if rule_against(member.name) != BY_PRODUCT]
    images = [member.name for member in visible if has_image_suffix(member.name)]
    keys = {key_of(name) for name in images}
    plain = {key_of(name) for name in images if _extension(name).count(".") == 0}
    left_out = Counter({BY_PRODUCT: len(members) - len(visible)})
    pictures = {key_of(name) for name in images if _extension(name).count(".") == 0 and suffix_of(name) != ".npy"}
    candidates: list[ArchivedFile] = []
    fields: dict[str, ArchivedFile] = {}
    for member in visible:
        if _is_field(member.name) and key_of(member.name) in keys:
            fields[member.name] = member
            left_out[SIDECAR] += 1
        elif _is_picture_beside(member.name) and key_of(member.name) in plain:
            if _extension(member.name).rpartition(".")[0] in kept:
                fields[member.name] = member
            else:
                left_out[MASK] += 1
        elif kept and _extension(member.name) == "npy" and key_of(member.name) in pictures:
            fields[member.name] = member
        else:
            candidates.append(member)
    return Archive(candidates=candidates, fields=fields, left_out=+left_out)


def key_of(name: str) -> str:
    """WebDataset's key of a name: the path up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def content(path: Path, file: ArchivedFile) -> bytes:
    """The bytes of a file in the archive `path`. Raises InputError where the archive has become shorter."""
    data = read_at(path, file.offset, file.length)
    if len(data) != file.length:
        raise has_changed(path, "has become shorter")
    return data


def labels_beside(images: Sequence[ArchivedFile], archives: Sequence[Archive], paths: Sequence[Path]) -> Labelling:
    """The label of each image, from its `.cls`, or `label` in its `.json`; for `a.1.jpg`, `a.1.cls` precedes `a.cls`.

    An image has no label where the file has none, or a word while others have numbers; a line reports either.
    """
    values: list[int | str | None] = []
    wrong: list[str] = []
    for image in images:
        file = _label_file(image, archives[image.archive].fields)
        value = None
        if file is not None:
            try:
                value = _label(paths[image.archive], file)
            except (ValueError, RecursionError):
                wrong.append(f"{paths[image.archive].name}: {file.name}")
        values.append(value)
    notices = [_without_label(wrong, "hold no label")] if wrong else []
    words = [value for value in values if isinstance(value, str)]
    if words and any(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        notices.append(_without_label(words, "hold a word where others hold a class number"))
    classes, labels = classes_of_values(values)
    return Labelling(classes=classes, labels=labels, notices=notices)


def fields_beside(
    images: Sequence[ArchivedFile], archives: Sequence[Archive], listed: Further[ArchivedFile], wanted: Wanted
) -> Further[ArchivedFile]:
    """The further members of each image: its caption, array and second images, or else what is `listed` for it.

    For `a.1.jpg`, `a.1.txt` precedes `a.txt`.
    """
    of_stem = [{_named(name, wanted): field for name, field in archive.fields.items()} for archive in archives]
    columns: dict[str, list[ArchivedFile | bytes | None]] = {}
    for member in ("npy", *SECOND_IMAGES) if wanted.caption_column is not None else ("txt", "npy", *SECOND_IMAGES):
        columns[member] = [
            next((found for stem in _stems(image) if (found := of_stem[image.archive].get((stem, member)))), None)
            for image in images
        ]
    for member, others in listed.columns.items():
        columns[member] = [own or other for own, other in zip(columns.get(member, [None] * len(images)), others)]
    return Further(columns)


def _named(name: str, wanted: Wanted) -> tuple[str, str]:
    """The stem of a field's name, and the member that it is: ("a", "low") for `a.low.png`, ("a", "txt") for `a.txt`."""
    stem, suffix = stem_of(name), suffix_of(name)
    if _extension(name) == "npy" or not has_image_suffix(name):
        return stem, suffix[1:]
    stem, _, word = stem.rpartition(".")
    return stem, PAIR if word == wanted.pair else word


def _stems(image: ArchivedFile) -> list[str]:
    return list(dict.fromkeys([stem_of(image.name), key_of(image.name)])) if has_image_suffix(image.name) else []


def crowded(names: Iterable[str]) -> list[str]:
    """A line where several images share a key, since webdataset would make fewer samples of these files."""
    counts = Counter(key_of(name) for name in names)
    keys = [key for key, images in counts.items() if images > 1]
    if not keys:
        return []
    return [
        f"{len(keys)} webdataset keys hold several images ({keys[0]!r} holds {counts[keys[0]]}); "
        "each image becomes a sample of its own"
    ]


def _without_label(found: Sequence[str], fault: str) -> str:
    return f"{len(found)} label files {fault}, such as {found[0]!r}; their images have none"


def _extension(name: str) -> str:
    """The part after the first dot of a name's last part, WebDataset's extension."""
    return name.rpartition("/")[2].partition(".")[2]


def _is_field(name: str) -> bool:
    """Whether a name has an extension that is not an image's."""
    return "." in name.rpartition("/")[2] and not has_image_suffix(name)


def _is_picture_beside(name: str) -> bool:
    """Whether an image's extension has a word before the last dot, as in `.seg.png`, rather than a number."""
    before = _extension(name).split(".")[:-1]
    return has_image_suffix(name) and any(not part.isdecimal() for part in before)


def _label_file(image: ArchivedFile, fields: dict[str, ArchivedFile]) -> ArchivedFile | None:
    names = [stem + suffix for stem in _stems(image) for suffix in (".cls", ".json")]
    found = next((fields[name] for name in names if name in fields), None)
    return found if found and found.kind == "file" and found.length <= MAX_LABEL_BYTES else None


def _label(path: Path, file: ArchivedFile) -> int | str | None:
    """The label in a file. Raises ValueError for invalid ones, RecursionError for a `.json` nested too deeply."""
    text = content(path, file).decode("utf-8-sig").strip()
    if file.name.endswith(".cls"):
        try:
            return int(text)
        except ValueError:
            if not text or "\n" in text or len(text) > LONGEST_WORD:
                raise
            return text
    value = json.loads(text)
    label: object = value.get("label") if isinstance(value, dict) else None
    if label is None or isinstance(label, int | str):
        return label
    raise ValueError(f"{label!r} is no label")
