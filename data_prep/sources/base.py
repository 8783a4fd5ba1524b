"""The interface of sources, and rules shared by sources of files."""

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

MAX_CLASSES = 1_000_000

LABEL_COLUMNS = ("label", "labels", "class")
CAPTION_COLUMNS = ("text", "caption")

Labels = Literal["auto", "none"]
LABELS: tuple[Labels, ...] = get_args(Labels)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Options for what is read of a source.

    `size` selects among TFRecords of several resolutions; `image_column` among a parquet file's columns of images, None
    if there is only one; with `labels` "none" images alone are read, so errors in labels and what else goes with them
    do not matter. `caption_column`: of captions, in a metadata file or a parquet file, None for the usual names or a
    `.txt` beside the image; `pair`: what second images are called, see `members_beside`, or their column in a parquet
    file.
    """

    size: int = 256
    split: Split = "train"
    labels: Labels = "auto"
    image_column: str | None = None
    caption_column: str | None = None
    pair: str | None = None

    @property
    def choice(self) -> list[list[object]]:
        """Rows of a fingerprint: how captions and second images are found; none for the usual way."""
        chosen = {"caption column": self.caption_column, "pair": self.pair}
        return [[name, value] for name, value in chosen.items() if value is not None]


AS_USUAL = Wanted()


class Source(Protocol):
    """Images in a fixed order, numbered from 0; the parts of a source are small when pickled."""

    @property
    def kind(self) -> str:
        """Kind of the source: "folder", "lmdb" and so on."""

    @property
    def names(self) -> Sequence[str]:
        """Origin of each image, in an order that is always the same; not necessarily unique."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, in the order of their numbers; empty where images have no labels."""

    @property
    def fingerprint(self) -> str:
        """Hex sha256 that depends on the names, their order and (as far as is cheap to check) the content."""

    @property
    def further_fingerprint(self) -> str:
        """Likewise of what `further` gives, where `fingerprint` does not depend on it; empty where there is nothing."""

    @property
    def natural_mode(self) -> Mode:
        """The default mode for storing images."""

    @property
    def notice(self) -> str | None:
        """Licence, origin, and what was selected or ignored, for the user."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """Number of files (or rows) that are no candidates, by the rule that excluded them; `names` is without them."""

    def label(self, i: int) -> int:
        """Position of image `i`'s class in `classes`, or UNLABELLED."""

    def read(self, i: int) -> bytes | Image.Image:
        """The encoded file, or the image itself.

        Raises Reject where this image is unavailable, and InputError where the source as a whole has changed or failed.
        """

    @property
    def members(self) -> Sequence[str]:
        """What else samples of this source may have, by the names of `data_prep.format.MEMBERS`; classes apart."""

    def further(self, i: int) -> dict[str, bytes]:
        """The content of the files of `members` that go with image `i`, by name. Raises as `read`."""

    def part(self, start: int, stop: int) -> Self:
        """Images [start, stop) as a source, renumbered from 0."""


def labels_from_folders(names: Sequence[str], among: Sequence[str] | None = None) -> tuple[list[str], list[int]]:
    """The class names and the label of each of `names`, from the top-level folders.

    They are classes if images lie in them and none beside them. A single folder around everything is skipped. Images
    are recognised by suffix here, so other files beside the class folders do no harm. `among`: names whose folders
    count as classes, where these are more than `names`, for example if a class is missing in a split.
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
    """The class names and the label of each image, from numbers (kept as they are) or words (sorted).

    Booleans count as words. None, a negative number and a word among numbers are no labels. Raises InputError for
    numbers of MAX_CLASSES or more.
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
    """Whether a name stays inside the archive's top folder, both with `/` and with `\\` as separators."""
    windows = PureWindowsPath(name)
    return not (PurePosixPath(name).is_absolute() or windows.is_absolute() or ".." in windows.parts)


def needed_module(name: str) -> Any:
    """Import an optional library. Raises InputError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this source needs {name}: pip install 'ddpm-trainer[sources]'") from error


def fingerprint_of(rows: Iterable[Sequence[object]]) -> str:
    """Hex sha256 over rows of JSON values, with unambiguous ends of rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
