"""Finds the columns of a parquet file with images and labels."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.sources.base import CAPTION_COLUMNS, LABEL_COLUMNS, Wanted, classes_of_values, needed_module
from data_prep.sources.members import PAIR

IMAGE_COLUMN = "image"
# Of columns of plain bytes, as written by img2dataset.
BINARY_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of image, its name and its label, and of further members by name; dots separate a struct's fields.

    `chosen`: whether it is another than the first column of images; `notice` is a line for the user.
    """

    bytes: str
    path: str | None
    label: str | None
    further: dict[str, str]
    chosen: bool
    notice: str | None


def find_columns(path: Path, schema: Any, wanted: Wanted) -> Columns:
    """Find the columns of a file with this Arrow schema.

    Raises InputError with the file `path`, where there is no column of images, not the requested one, or several of
    which none is called `image`.
    """
    structs = list(_structs(schema, ""))
    named = [field for field in schema if field.name.lower() in BINARY_NAMES]
    binaries = [] if structs else [field.name for field in named if _is_binary(field.type)]
    images = [name for name, _ in structs] or binaries
    first = [name for name in images if name != wanted.pair]
    name = _image_column(path, schema, first, wanted.image_column)
    label, notice = _label_column(schema) if wanted.labels == "auto" else (None, None)
    notices = [notice] if notice else []
    end = "" if binaries else ".bytes"
    further = {}
    if wanted.labels == "auto":
        captions = CAPTION_COLUMNS if wanted.caption_column is None else (wanted.caption_column,)
        texts = [caption for caption in captions if caption in schema.names and _is_text(schema.field(caption).type)]
        further = {"txt": texts[0]} if texts else {}
        further |= {PAIR: f"{wanted.pair}{end}"} if wanted.pair in images else {}
    if len(first) > 1:
        notices.append(f"reads column {name} of {', '.join(images)}; see --image-column")
    return Columns(
        bytes=f"{name}{end}",
        path=f"{name}.path" if dict(structs).get(name) else None,
        label=label,
        further=further,
        chosen=name != images[0],
        notice="\n".join(notices) or None,
    )


def inner(row: Any, column: str) -> Any:
    """The value of a dotted column name in a row, a dictionary; None where a part of the path is null."""
    if column in row:  # column names may contain dots
        return row[column]
    for part in column.split("."):
        row = row.get(part) if row else None
    return row


def classes_of_column(schema: Any, column: str | None, values: Sequence[Any]) -> tuple[list[str], list[int]]:
    """The class names and each row's label; numbers get names from Hugging Face's metadata where it has any."""
    classes, labels = classes_of_values(values)
    names = _class_names(schema, column) if column else []
    if len(names) < len(classes) or not all(value is None or type(value) is int for value in values):
        return classes, labels
    return names, labels


def _structs(fields: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    """(name, whether it has a path) of each struct with an image's bytes, at any depth."""
    types = needed_module("pyarrow").types
    for field in fields:
        if not types.is_struct(field.type):
            continue
        parts = {part.name: part.type for part in field.type}
        if "bytes" in parts and _is_binary(parts["bytes"]):
            yield prefix + field.name, "path" in parts and _is_text(parts["path"])
        else:
            yield from _structs(field.type, f"{prefix}{field.name}.")


def _image_column(path: Path, schema: Any, images: Sequence[str], wanted: str | None) -> str:
    if wanted is not None and wanted not in images:
        known = f"it has {', '.join(images)}" if images else f"its columns are {', '.join(schema.names)}"
        raise InputError(f"{path}: has no column of images {wanted}; {known}")
    if not images:
        raise InputError(f"{path}: has no column of {{bytes, path}}; its columns are {', '.join(schema.names)}")
    if wanted is None and len(images) > 1 and IMAGE_COLUMN not in images:
        raise InputError(f"{path}: has {len(images)} columns of images; say --image-column {' or '.join(images)}")
    if wanted is not None:
        return wanted
    return images[0] if len(images) == 1 else IMAGE_COLUMN


def _label_column(schema: Any) -> tuple[str | None, str | None]:
    """The column of labels, and a line where it has an unsupported type."""
    types = needed_module("pyarrow").types
    found = [schema.field(name) for name in LABEL_COLUMNS if name in schema.names]
    for field in found:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        if types.is_integer(kind) or types.is_boolean(kind) or _is_text(kind):
            return field.name, None
    if not found:
        return None, None
    return None, f"column {found[0].name} is of {found[0].type}, which are no labels: the images have none"


def _is_binary(kind: Any) -> bool:
    types = needed_module("pyarrow").types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(kind: Any) -> bool:
    types = needed_module("pyarrow").types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _class_names(schema: Any, column: str) -> list[str]:
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
