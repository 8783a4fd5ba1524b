"""Label files: EDM's `dataset.json`, Hugging Face's `metadata.csv` and `.jsonl`, ProGAN's `*-rxx.labels`."""

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.sources.base import CAPTION_COLUMNS, LABEL_COLUMNS, classes_of_values
from data_prep.sources.rules import parts_of

JSON_NAME = "dataset.json"
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
FILE_COLUMN = "file_name"
MAX_BYTES = 1 << 30
WITHOUT = "--labels none does without"

Value = int | str | None


class UnreadableError(ValueError):
    """A damaged file of labels, or of captions alone; the message is a line for the user."""


def listed_labels(name: str, data: bytes, where: str) -> dict[str, Value] | None:
    """The label of each file listed in a label file, by path relative to that file's folder.

    name: the label file's own, JSON_NAME or one of METADATA_NAMES; data: its content. None where it is an unrelated
    file of that name, or has no column of labels. Raises UnreadableError where it is damaged, and InputError for
    invalid labels; both messages begin with `where`.
    """
    if name == JSON_NAME:
        return _labels_of_json(data, where)
    rows = _rows(name, data, where)
    column = next((column for column in LABEL_COLUMNS if any(column in row for row in rows)), None)
    if column is None:
        return None
    labels = {_path(str(row[FILE_COLUMN])): row.get(column) for row in rows if row.get(FILE_COLUMN)}
    wrong = next((label for label in labels.values() if not isinstance(label, int | str | None)), None)
    if wrong is not None:
        raise InputError(f"{where}: {json.dumps(wrong)} in column {column} is no label; {WITHOUT}")
    return labels if name.endswith(".jsonl") else _numbers_or_words(labels)


def listed_captions(name: str, data: bytes, column: str | None, where: str) -> dict[str, Value] | None:
    """The caption of each file listed in a metadata file, by path as in `listed_labels`.

    column: None for the first of CAPTION_COLUMNS that has text; None is returned where there is no such column. Raises
    UnreadableError where the file is damaged.
    """
    rows = _rows(name, data, where)
    columns = CAPTION_COLUMNS if column is None else (column,)
    found = next((column for column in columns if any(isinstance(row.get(column), str) for row in rows)), None)
    if found is None:
        return None
    return {_path(str(row[FILE_COLUMN])): str(row[found]) for row in rows if row.get(FILE_COLUMN) and row.get(found)}


def values_of(
    listed: Mapping[str, Value], names: Sequence[str], chosen: Sequence[str], where: str
) -> tuple[list[Value], str | None]:
    """The label of each of `chosen` from the file `where`, and a line where it lists files that are not among `names`.

    All paths are relative to the file's folder. Unicode forms of a name are treated as equal. Unlisted files have no
    label. Raises InputError where labels are listed and none belongs to a file.
    """
    by_name = {unicodedata.normalize("NFC", name): label for name, label in listed.items()}
    unmatched = by_name.keys() - {unicodedata.normalize("NFC", name) for name in names}
    if by_name and len(unmatched) == len(by_name):
        example = chosen[0] if chosen else "none"
        raise InputError(
            f"{where}: none of its {len(by_name)} names is a file's (it lists {next(iter(by_name))!r}, there is "
            f"{example!r}); mend it, or {WITHOUT}"
        )
    notice = None
    if unmatched:
        notice = f"{where}: {len(unmatched)} of its {len(by_name)} names are no file's, such as {min(unmatched)!r}"
    return [by_name.get(unicodedata.normalize("NFC", name)) for name in chosen], notice


def labels_of_progan(records: Path, count: int) -> tuple[list[str], list[int]] | None:
    """The class names and the label of each of `count` records of `NAME-r08.tfrecords`, from `NAME-rxx.labels`.

    The file is an array in `np.save`'s format, of shape (count, classes) with one-hot rows, or (count,) with numbers;
    None where there is no such file. Raises InputError where it is something else.
    """
    prefix, separator, _ = records.name.rpartition("-r")
    path = records.with_name(f"{prefix}-rxx.labels")
    if not separator or not path.is_file():
        return None
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not an array of labels ({error})") from error
    if not isinstance(values, np.ndarray) or values.ndim not in (1, 2) or len(values) != count:
        shape = getattr(values, "shape", "no array")
        raise InputError(f"{path}: {shape}; there are {count} records, so it should be ({count}, classes)")
    if values.ndim == 2:
        if not (((values == 0) | (values == 1)).all() and (values.sum(axis=1) == 1).all()):
            raise InputError(f"{path}: has rows without a single 1; {WITHOUT}")
        return [str(number) for number in range(values.shape[1])], values.argmax(axis=1).tolist()
    if not np.issubdtype(values.dtype, np.integer) or (len(values) and values.min() < 0):
        raise InputError(f"{path}: {values.dtype} that are no class numbers; {WITHOUT}")
    return classes_of_values(values.tolist())


def _labels_of_json(data: bytes, where: str) -> dict[str, Value] | None:
    """Labels from `{"labels": [["00000/img00000000.png", 6], ...]}`, where null counts as []; None for other files."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or "labels" not in content:
        return None
    try:
        numbers: dict[str, Value] = {_path(name): label for name, label in content["labels"] or []}
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: `labels` must be a list of [name, class number]; {WITHOUT}") from error
    wrong = next((label for label in numbers.values() if type(label) is not int or label < 0), None)
    if wrong is not None:
        raise InputError(f"{where}: {json.dumps(wrong)} is no class number; {WITHOUT}")
    return numbers


def _path(name: str) -> str:
    """A path in the form used for names: separated by `/`, without a prefix."""
    return "/".join(parts_of(name.replace("\\", "/")))


def _rows(name: str, data: bytes, where: str) -> list[dict[str, Any]]:
    try:
        if name.endswith(".csv"):  # with or without a byte order mark, and any line endings
            return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
        return list(_jsonl_rows(data))
    except (ValueError, csv.Error, RecursionError) as error:
        raise UnreadableError(f"{where}: cannot be read ({error}), so that no label is taken from it") from error


def _jsonl_rows(data: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield row


def _numbers_or_words(labels: Mapping[str, Any]) -> dict[str, Value]:
    """CSV has only strings: they become numbers if all look like numbers; empty ones are no labels."""
    filled = [label for label in labels.values() if label]
    kind: Callable[[str], Value] = int if all(label.isdecimal() for label in filled) else str
    return {name: kind(label) if label else None for name, label in labels.items()}
