"""Hugging Face's image datasets as parquet: a column of {bytes, path}, and optionally one of labels."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from data_prep.errors import InputError, Reject
from data_prep.sources.base import Wanted, fingerprint_of, needed_module
from data_prep.sources.columns import Columns, classes_of_column, find_columns, inner
from data_prep.sources.placed import PlacedSource
from data_prep.sources.reading import check_length, has_changed

MAGIC = b"PAR1"
ROWS_AT_ONCE = 16  # a row group may contain a gigabyte of images


@dataclass(frozen=True)
class RowGroup:
    """Rows from `first` on of the dataset are those of row group `group` in file number `file`."""

    first: int
    file: int
    group: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ParquetSource(PlacedSource[int]):
    """All rows of the files in order; the fingerprint covers files' sizes, row groups, paths and labels.

    Places are numbers of rows, through all files.
    """

    files: list[Path]
    groups: list[RowGroup]
    columns: dict[str, str]  # of the image, called "", and of the further members
    kind: ClassVar[str] = "parquet"

    @classmethod
    def open(cls, folder: Path, file_names: Sequence[str], wanted: Wanted) -> Self:
        """Read paths and labels, but no image. Raises InputError where a file has no images, or pyarrow is missing."""
        files = [(folder / name).absolute() for name in file_names]
        tables = [_open(path) for path in files]
        columns = find_columns(files[0], tables[0].schema_arrow, wanted)
        for path, table in zip(files, tables):
            if find_columns(path, table.schema_arrow, wanted) != columns:
                raise InputError(
                    f"{path}: has other columns of images or labels than {files[0].name}; give one data set"
                )
        groups: list[RowGroup] = []
        names: list[str] = []
        values: list[Any] = []
        for number, (path, table) in enumerate(zip(files, tables)):
            for group in range(table.num_row_groups):
                groups.append(RowGroup(len(names), number, group))
                paths, found = _names_and_labels(path, table, group, columns)
                names += [name or f"{path.name}:{group}:{i}" for i, name in enumerate(paths)]
                values += found
        classes, labels = classes_of_column(tables[0].schema_arrow, columns.label, values)
        sizes = [[path.stat().st_size, table.num_row_groups] for path, table in zip(files, tables)]
        chosen = [[columns.bytes]] if columns.chosen else []  # omitted for the first column, as in earlier versions
        rows = ([name, label] for name, label in zip(names, labels))
        return cls(
            files=files,
            groups=groups,
            columns={"": columns.bytes, **columns.further},
            names=names,
            places=range(len(names)),
            labels=labels,
            classes=classes,
            fingerprint=fingerprint_of([*sizes, *chosen, *wanted.choice, *rows]),
            notice=columns.notice,
        )

    @property
    def members(self) -> list[str]:  # noqa: D102 - see Source
        return [name for name in self.columns if name]

    def read(self, i: int) -> bytes:  # noqa: D102 - see Source
        data: bytes | None = self._row(i)[""]
        if data is None:
            raise Reject("no bytes", "the row only names a file; embed it into the parquet")
        check_length(len(data))
        return data

    def further(self, i: int) -> dict[str, bytes]:  # noqa: D102 - see Source
        row = self._row(i)
        values = {name: row[name] for name in self.members if row[name]}
        return {name: value.encode() if isinstance(value, str) else value for name, value in values.items()}

    def _row(self, i: int) -> dict[str, Any]:
        """The values of `columns` in the row of image `i`."""
        row = self.places[i]
        group = self.groups[bisect_right(self.groups, row, key=lambda group: group.first) - 1]
        columns = tuple(self.columns.items())
        return _reader(self.files[group.file], group.group, columns).read(row - group.first)


def _open(path: Path) -> Any:
    parquet = needed_module("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _names_and_labels(path: Path, table: Any, group: int, columns: Columns) -> tuple[list[str | None], list[Any]]:
    """The path (or None) and the label (or None) of each row of a group."""
    wanted = [column for column in (columns.path, columns.label) if column is not None]
    if not wanted:
        count = table.metadata.row_group(group).num_rows
        return [None] * count, [None] * count
    try:
        rows = table.read_row_group(group, columns=wanted)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: row group {group} cannot be read ({_first_line(error)})") from error
    labels = rows[columns.label].to_pylist() if columns.label else [None] * len(rows)
    if columns.path is None:
        return [None] * len(rows), labels
    return [inner(row, columns.path) for row in rows.to_pylist()], labels


class _GroupReader:
    """Columns of one row group, a few rows in memory at a time; forward reads are cheap, a backward one starts anew."""

    def __init__(self, path: Path, group: int, columns: tuple[tuple[str, str], ...]) -> None:
        self._path, self._group, self._columns = path, group, columns
        self._first, self._rows = 0, list[dict[str, Any]]()
        self._batches = self._read_batches()

    def read(self, row: int) -> dict[str, Any]:
        """The values of a row by the names of the columns; None for what the row does not have."""
        if row < self._first:
            self._first, self._rows, self._batches = 0, [], self._read_batches()
        while row >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._rows = next(self._batches)
        return self._rows[row - self._first]

    def _read_batches(self) -> Iterator[list[dict[str, Any]]]:
        table, columns = _open(self._path), [column for _, column in self._columns]
        try:
            for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[self._group], columns=columns):
                yield [{name: inner(row, column) for name, column in self._columns} for row in batch.to_pylist()]
        except (OSError, ValueError) as error:
            raise InputError(f"{self._path}: row group {self._group} cannot be read ({_first_line(error)})") from error
        raise has_changed(self._path, "has lost rows")


_reader = lru_cache(maxsize=1)(_GroupReader)  # one per process, since rows are read in order


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
