"""Train, validation and test splits, by names of folders and files as in Hugging Face's and torchvision's layouts."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal, get_args

from data_prep.errors import InputError
from data_prep.sources.rules import parts_of

Split = Literal["train", "validation", "test", "all"]
SPLITS: tuple[Split, ...] = get_args(Split)

# fmt: off
WORDS: dict[str, Split] = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}
# fmt: on
COMPANIONS = frozenset({"unlabeled", "unlabelled", "extra"})  # a part of its own beside splits, otherwise a class
_WORD = "|".join(sorted(WORDS, key=len, reverse=True))
_WHAT = r"sets?|images?|imgs?|photos?|data|split"
_FOLDER = re.compile(rf"(?:(?:{_WHAT})[-_. ])?({_WORD})(?:[-_. ]?(?:{_WHAT}|\d{{2,4}}))*", re.IGNORECASE)
_IN_NAME = re.compile(rf"(?:^|[^a-z])({_WORD})(?=$|[^a-z])", re.IGNORECASE)
_AT_START = re.compile(rf"({_WORD})[-_. ]?\d[^/]*|({_WORD})[-_.][^/]+", re.IGNORECASE)


def split_called(text: str) -> Split | None:
    """The split that a user names, as in `--split val`, or None."""
    word = text.lower()
    return "all" if word == "all" else WORDS.get(word)


def split_of_folder(name: str) -> Split | None:
    """The split that a folder's name denotes: `val`, `train2017`, `test_images`; None for `trains` or `cat`."""
    match = _FOLDER.fullmatch(name)
    return WORDS[match[1].lower()] if match else None


def split_of_file(path: str) -> Split | None:
    """The split denoted by an archive's name or a folder above it: `data/train-00000-of-00001.parquet`.

    The last part of the path that denotes a split counts; a part that denotes two counts for none.
    """
    for part in reversed(PurePosixPath(path).parts):
        found = {WORDS[word.lower()] for word in _IN_NAME.findall(part)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def splits_of_images(images: Sequence[str]) -> tuple[list[Split | None], int]:
    """The split of each of `images`, and the number of leading path parts up to the one that denotes it (0 for none).

    Folders denote splits only if all siblings do, so that a class `train` beside `car` and `bus` remains a class; a
    single folder around everything is skipped. Within a folder that has no subfolders, file names denote splits, if all
    of them do and they differ.
    """
    paths = [parts_of(name) for name in images]
    best: tuple[list[Split | None], int] = ([None] * len(paths), 0)
    depth = 0
    while paths:
        tops = {parts[depth] for parts in paths if len(parts) > depth + 1}
        if not tops:
            found = [_split_at_start(parts[depth]) for parts in paths]
            return (found, 0) if None not in found and len(set(found)) > 1 else best
        told = {split_of_folder(top) for top in tops if top.lower() not in COMPANIONS}
        if None not in told and (len(told) > 1 or len(tops) == 1):
            best = [split_of_folder(p[depth]) if len(p) > depth + 1 else None for p in paths], depth + 1
        if len(tops) > 1 or any(len(parts) == depth + 1 for parts in paths):
            break
        depth += 1
    return best


def chosen_of(splits: Sequence[Split | None], wanted: Split, where: str) -> list[int] | None:
    """The positions of split `wanted`; None for all, if there are no splits or all are wanted.

    A single split counts as none, so that a folder named `test` can be given directly, unless another split is
    requested. Raises InputError, whose message begins with `where`, where there is no such split.
    """
    found = sorted({split for split in splits if split})
    if wanted == "all" or (wanted == "train" and len(found) < 2):
        return None
    if wanted not in found:
        known = f"it has {', '.join(found)}" if found else "no folder or file in it is called after one"
        raise InputError(f"{where}: has no split {wanted}; {known}")
    return [position for position, split in enumerate(splits) if split == wanted]


def _split_at_start(name: str) -> Split | None:
    match = _AT_START.fullmatch(name)
    return WORDS[(match[1] or match[2]).lower()] if match else None
