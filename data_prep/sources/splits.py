"""Train, validation and test: told by the names of folders and files, as Hugging Face and torchvision lay them out."""

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
COMPANIONS = frozenset({"unlabeled", "unlabelled", "extra"})  # beside splits a part of its own, alone a class
_WORD = "|".join(sorted(WORDS, key=len, reverse=True))
_WHAT = r"sets?|images?|imgs?|photos?|data|split"
_FOLDER = re.compile(rf"(?:(?:{_WHAT})[-_. ])?({_WORD})(?:[-_. ]?(?:{_WHAT}|\d{{2,4}}))*", re.IGNORECASE)
_IN_NAME = re.compile(rf"(?:^|[^a-z])({_WORD})(?=$|[^a-z])", re.IGNORECASE)
_AT_START = re.compile(rf"({_WORD})[-_. ]?\d[^/]*|({_WORD})[-_.][^/]+", re.IGNORECASE)


def split_called(text: str) -> Split | None:
    """What a user means by `--split val`: a split, or None."""
    word = text.lower()
    return "all" if word == "all" else WORDS.get(word)


def split_of_folder(name: str) -> Split | None:
    """The split that a folder is called after: `val`, `train2017`, `test_images`; None for `trains` or `cat`."""
    match = _FOLDER.fullmatch(name)
    return WORDS[match[1].lower()] if match else None


def split_of_file(path: str) -> Split | None:
    """The split that an archive's name or a folder above it tells: `data/train-00000-of-00001.parquet`.

    The last part that tells one counts; a part that tells two tells none.
    """
    for part in reversed(PurePosixPath(path).parts):
        found = {WORDS[word.lower()] for word in _IN_NAME.findall(part)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def splits_of_images(images: Sequence[str]) -> tuple[list[Split | None], int]:
    """The split of each of `images`, and how many parts of a path stand before and in that name (0 where none does).

    Folders tell splits where all that lie beside each other are called after one, so that a class `train` among `car`
    and `bus` stays a class; a single folder around everything is looked into. In one folder without others, file names
    tell them, where all of them do and not the same.
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
    """The positions of split `wanted`; None where all are meant, for there are no splits or all are wanted.

    A single split is none, so that a folder that is called `test` can be given as it is, unless another is asked for.
    Raises InputError, which begins with `where`, where there is no such split.
    """
    found = sorted({split for split in splits if split})
    if wanted == "all" or (wanted == "train" and len(found) < 2):
        return None
    if wanted not in found:
        known = f"it has {', '.join(found)}" if found else "no folder or file in it is called after one"
        raise InputError(f"{where}: has no split {wanted}; {known}")
    return [position for position, split in enumerate(splits) if split == wanted]


def left_out_by_split(splits: Sequence[Split | None], wanted: Split) -> list[str]:
    """A rule for each that is not of split `wanted`, in the words of the summary."""
    return [f"images of split {split}" if split else "images outside the splits" for split in splits if split != wanted]


def _split_at_start(name: str) -> Split | None:
    match = _AT_START.fullmatch(name)
    return WORDS[(match[1] or match[2]).lower()] if match else None
