"""What every source of images offers, and the rules that file-like sources share."""

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal, Protocol, Self, get_args

from PIL import Image

from data_prep.errors import InputError
from data_prep.format import UNLABELLED
from data_prep.recipe import Mode
from data_prep.sources.rules import has_image_suffix, parts_of
from data_prep.sources.splits import Split

MAX_FILE_BYTES = 256 * 1024**2  # no image worth a sample is larger; a file is held in memory whole

MAX_CLASSES = 1_000_000

LABEL_COLUMNS = ("label", "labels", "class")

Labels = Literal["auto", "none"]
LABELS: tuple[Labels, ...] = get_args(Labels)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What of a source is read.

    `size` chooses among TFRecords of several resolutions; `image_column` among a parquet file's columns of images, None
    where there is one; `labels` "none" leaves labels unread, whatever is wrong with them.
    """

    size: int = 256
    split: Split = "train"
    labels: Labels = "auto"
    image_column: str | None = None


class Source(Protocol):
    """Images in a fixed order, numbered from 0; small to pickle once cut into parts."""

    @property
    def kind(self) -> str:
        """What the source is: "folder", "lmdb" and so on."""

    @property
    def names(self) -> Sequence[str]:
        """Where each image came from, in an order that is always the same; not necessarily unique."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, in the order of their numbers; empty where the images have no labels."""

    @property
    def fingerprint(self) -> str:
        """Hex sha256 that changes with the names, their order or (as far as can be told cheaply) the content."""

    @property
    def natural_mode(self) -> Mode:
        """The mode to store where none is asked for."""

    @property
    def notice(self) -> str | None:
        """Licence, origin, and what was chosen or ignored, for a person to read."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files (or rows) are no candidates, by the rule that says so; `names` has none of them."""

    def label(self, i: int) -> int:
        """Position of image `i`'s class in `classes`, or UNLABELLED."""

    def read(self, i: int) -> bytes | Image.Image:
        """The encoded file, or the image itself.

        Raises Reject where this one cannot be had and InputError where the source as a whole has changed or failed.
        """

    def part(self, start: int, stop: int) -> Self:
        """Images [start, stop) as a source of their own, renumbered from 0."""


def labels_from_folders(names: Sequence[str], among: Sequence[str] | None = None) -> tuple[list[str], list[int]]:
    """The class names and the label of each of `names`, from the folders right under the top.

    They are classes where images lie in them and none beside them. A single folder that holds everything is taken
    for a wrapper and looked into instead. Whether a file counts as an image is judged by its suffix here, so that a
    file of another kind beside the class folders does no harm. `among`: names whose folders count, where they are more
    than `names`, as for a split in which a class is missing.
    """
    images = [parts_of(name) for name in among or names if has_image_suffix(name)]
    depth = 0
    while images and all(len(parts) > depth + 1 for parts in images):
        classes = sorted({parts[depth] for parts in images})
        if len(classes) > 1:
            position = {(*images[0][:depth], name): label for label, name in enumerate(classes)}
            return classes, [position.get(parts_of(name)[: depth + 1], UNLABELLED) for name in names]
        depth += 1
    return [], [UNLABELLED] * len(names)


def classes_of_values(values: Sequence[int | str | None]) -> tuple[list[str], list[int]]:
    """The class names and the label of each image, from numbers (which stay as they are) or from words (sorted).

    Truth values are words. None, a negative number or a word among numbers is no label. Raises InputError for numbers
    beyond MAX_CLASSES.
    """
    values = [str(value).lower() if isinstance(value, bool) else value for value in values]
    numbers = [value if isinstance(value, int) and value >= 0 else UNLABELLED for value in values]
    highest = max(numbers, default=UNLABELLED)
    if highest >= MAX_CLASSES:
        raise InputError(
            f"label {highest}: not a class number, which are below {MAX_CLASSES}; --labels none does without"
        )
    if highest != UNLABELLED:
        return [str(number) for number in range(highest + 1)], numbers
    words = sorted({value for value in values if isinstance(value, str)})
    position = {word: label for label, word in enumerate(words)}
    return words, [position[value] if isinstance(value, str) else UNLABELLED for value in values]


def is_safe(name: str) -> bool:
    """Whether a name stays below the archive's top, be it read with `/` or with `\\`."""
    windows = PureWindowsPath(name)
    return not (PurePosixPath(name).is_absolute() or windows.is_absolute() or ".." in windows.parts)


def needed_module(name: str) -> Any:
    """Import a library that only some sources need. Raises InputError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this source needs {name}: pip install 'ddpm-trainer[sources]'") from error


def fingerprint_of(rows: Iterable[Sequence[object]]) -> str:
    """Hex sha256 over rows of JSON values; the end of each row is unmistakable."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
