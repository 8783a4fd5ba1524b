"""Hugging Face's image datasets as parquet: a column of {bytes, path}, and perhaps one of labels."""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from data_prep.errors import InputError, Reject
from data_prep.recipe import Mode
from data_prep.sources.base import MAX_FILE_BYTES, classes_of_values, fingerprint_of, needed_module

MAGIC = b"PAR1"
LABEL_COLUMNS = ("label", "labels", "class")
SPLIT_NAME = re.compile(r"(train|test|validation)(-\d+-of-\d+(-\w+)?)?\.parquet")
ROWS_AT_ONCE = 16  # a row group may hold a gigabyte of images


@dataclass(frozen=True)
class Place:
    """Rows [first, ...) of the dataset are those of row group `group` of file number `file`."""

    first: int
    file: int
    group: int


@dataclass(frozen=True)
class ParquetSource:
    """All rows of the files in their order; the fingerprint covers files' sizes, row groups, paths and labels."""

    files: list[Path]
    places: list[Place]
    column: str
    start: int
    names: list[str]
    labels: list[int]
    classes: list[str]
    fingerprint: str
    notice: str | None
    kind: ClassVar[str] = "parquet"
    natural_mode: ClassVar[Mode] = "RGB"

    @classmethod
    def open(cls, files: Sequence[Path], split: str) -> Self:
        """Read paths and labels, but no image. Raises InputError where a file has no images, or pyarrow is missing."""
        chosen, notice = _of_split([path.resolve() for path in files], split)
        tables = [_open(path) for path in chosen]
        column, label_column = _columns(chosen[0], tables[0].schema_arrow)
        for path, table in zip(chosen, tables):
            if _columns(path, table.schema_arrow) != (column, label_column):
                raise InputError(
                    f"{path}: has other columns of images or labels than {chosen[0].name}; give one data set"
                )
        places: list[Place] = []
        names: list[str] = []
        values: list[int | str | None] = []
        for number, (path, table) in enumerate(zip(chosen, tables)):
            for group in range(table.num_row_groups):
                places.append(Place(len(names), number, group))
                rows = _read_group(path, table, group, [f"{column}.path", *label_column])
                paths = [row and row["path"] for row in rows[column].to_pylist()]
                names += [name or f"{path.name}:{group}:{i}" for i, name in enumerate(paths)]
                values += rows[label_column[0]].to_pylist() if label_column else [None] * len(rows)
        classes, labels = _classes(tables[0].schema_arrow, label_column, values)
        sizes = [[path.stat().st_size, table.num_row_groups] for path, table in zip(chosen, tables)]
        fingerprint = fingerprint_of([*sizes, *([name, label] for name, label in zip(names, labels))])
        return cls(chosen, places, column, 0, names, labels, classes, fingerprint, notice)

    def label(self, i: int) -> int:  # noqa: D102 - see Source
        return self.labels[i]

    def read(self, i: int) -> bytes:  # noqa: D102 - see Source
        row = self.start + i
        place = self.places[bisect_right(self.places, row, key=lambda place: place.first) - 1]
        data = _reader(self.files[place.file], place.group, self.column).read(row - place.first)
        if data is None:
            raise Reject("no bytes", "the row only names a file; embed it into the parquet")
        if len(data) > MAX_FILE_BYTES:
            raise Reject("file too large", f"{len(data)} bytes")
        return data

    def part(self, start: int, stop: int) -> Self:  # noqa: D102 - see Source
        names, labels = self.names[start:stop], self.labels[start:stop]
        return replace(self, start=self.start + start, names=names, labels=labels, notice=None)


def is_parquet(path: Path) -> bool:
    """Whether the file begins as parquet does."""
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def find_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, or of its `data/`, where Hugging Face's repositories keep them."""
    for place in (folder, folder / "data"):
        if files := sorted(path for path in place.glob("*.parquet") if path.is_file() and is_parquet(path)):
            return files
    return []


def _of_split(files: list[Path], split: str) -> tuple[list[Path], str | None]:
    """The files named after `split`; all of them where names tell no splits."""
    matches = [SPLIT_NAME.fullmatch(path.name) for path in files]
    splits = [match.group(1) if match else None for match in matches]
    if not any(splits) and split == "train":
        return files, None
    chosen = [path for path, name in zip(files, splits) if name == split]
    if not chosen:
        known = ", ".join(sorted({name for name in splits if name})) or "none by its files' names"
        raise InputError(f"{files[0].parent}: has no split {split}; it has {known}")
    notice = f"reads {len(chosen)} of {len(files)} files: split {split}" if len(chosen) < len(files) else None
    return chosen, notice


def _open(path: Path) -> Any:
    parquet = needed_module("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _columns(path: Path, schema: Any) -> tuple[str, list[str]]:
    """The column of images, and that of labels as a list of one or none."""
    types = needed_module("pyarrow").types
    structs = [field for field in schema if types.is_struct(field.type)]
    images = [field.name for field in structs if {"bytes", "path"} <= {part.name for part in field.type}]
    if not images:
        raise InputError(f"{path}: has no column of {{bytes, path}}; its columns are {', '.join(schema.names)}")
    labels = [name for name in LABEL_COLUMNS if name in schema.names]
    usable = [
        name for name in labels if types.is_integer(schema.field(name).type) or types.is_string(schema.field(name).type)
    ]
    return images[0], usable[:1]


def _read_group(path: Path, table: Any, group: int, columns: list[str]) -> Any:
    try:
        return table.read_row_group(group, columns=columns)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: row group {group} cannot be read ({_first_line(error)})") from error


def _classes(schema: Any, label_column: list[str], values: list[int | str | None]) -> tuple[list[str], list[int]]:
    """Names from Hugging Face's own metadata where they are there."""
    classes, labels = classes_of_values(values)
    names = _class_names(schema, label_column[0]) if label_column else []
    if len(names) < len(classes) or not all(value is None or isinstance(value, int) for value in values):
        return classes, labels
    return names, labels


def _class_names(schema: Any, column: str) -> list[str]:
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


class _GroupReader:
    """The images of one row group, a few rows in memory at a time; going forward is cheap, going back begins anew."""

    def __init__(self, path: Path, group: int, column: str) -> None:
        self._path, self._group, self._column = path, group, column
        self._first, self._rows = 0, list[bytes | None]()
        self._batches = self._read_batches()

    def read(self, row: int) -> bytes | None:
        """The image's bytes, or None where the row has none."""
        if row < self._first:
            self._first, self._rows, self._batches = 0, [], self._read_batches()
        while row >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._rows = next(self._batches)
        return self._rows[row - self._first]

    def _read_batches(self) -> Iterator[list[bytes | None]]:
        table = _open(self._path)
        try:
            for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[self._group], columns=[f"{self._column}.bytes"]):
                yield [row["bytes"] if row else None for row in batch.column(0).to_pylist()]
        except (OSError, ValueError) as error:
            raise InputError(f"{self._path}: row group {self._group} cannot be read ({_first_line(error)})") from error
        raise InputError(f"{self._path}: has lost rows; the source must stay as it is during a run")


@lru_cache(maxsize=1)
def _reader(path: Path, group: int, column: str) -> _GroupReader:
    """One at a time in a process, since rows are read in their order."""
    return _GroupReader(path, group, column)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
