"""Lists files below a folder: paths, links followed, by-products of systems left out."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import InputError
from data_prep.sources.rules import BY_PRODUCT, LINK, SPECIAL, is_by_product

LINKS_SHOWN = 3


@dataclass
class Listing:
    """Files below `root`, sorted by relative path, and the number of files left out, by rule.

    `linked`: symbolic links to folders that were followed; `skipped`: those that were not.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    linked: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """A line for each kind of linked folders."""
        said = [(self.linked, "reads", ""), (self.skipped, "leaves out", ": what they lead to is read already")]
        return [f"{verb} linked folders: {_some(names)}{why}" for names, verb, why in said if names]


def list_files(root: Path) -> Listing:
    """List `root` recursively. Links to files count as files, even if broken.

    A linked folder is entered under its link's name, unless it contains, or is inside, a folder that is read anyway:
    nothing is read twice, and cycles end. Raises InputError where a folder cannot be listed that is no by-product.
    """
    listing = Listing(root)
    entered = [os.path.realpath(root)]
    waiting = [(str(root), "")]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed ({error.strerror})") from error
        below = []
        for entry in found:
            name = prefix + entry.name
            if is_by_product(entry.name):
                listing.left_out[BY_PRODUCT] += _count(entry)
            elif _is_folder(entry):
                if not entry.is_symlink() or _enter(entry.path, entered):
                    below.append((entry.path, name + "/"))
                    listing.linked += [name] if entry.is_symlink() else []
                else:
                    listing.left_out[LINK] += 1
                    listing.skipped.append(name)
            elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
                listing.names.append(name)
            else:
                listing.left_out[SPECIAL] += 1
        waiting += reversed(below)
    listing.names.sort()
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a cyclic link, or one through a folder without permission
        return False


def _enter(link: str, entered: list[str]) -> bool:
    """Record the target of a linked folder; False where it overlaps with what is read anyway."""
    target = os.path.realpath(link)
    if any(os.path.commonpath([target, other]) in (target, other) for other in entered):
        return False
    entered.append(target)
    return True


def _count(entry: os.DirEntry[str]) -> int:
    """Number of files in a by-product; a folder that cannot be listed counts as one."""
    if entry.is_symlink() or not _is_folder(entry):
        return 1
    closed = list[OSError]()
    return sum(len(files) for _, _, files in os.walk(entry.path, onerror=closed.append)) + len(closed)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LINKS_SHOWN} more" if len(names) > LINKS_SHOWN else ""
    return ", ".join(names[:LINKS_SHOWN]) + more
