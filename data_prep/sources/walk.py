"""What lies below a folder: files by their paths, links followed to where they lead, by-products left out."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import InputError
from data_prep.sources.rules import BY_PRODUCT, LINK, SPECIAL, is_by_product

LINKS_SHOWN = 3


@dataclass
class Listing:
    """Files below `root`, sorted by their path relative to it, and what was left out, counted by rule.

    `linked` are the linked folders that were entered, `skipped` those that were not.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    linked: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """A line for linked folders of each kind."""
        said = [(self.linked, "reads", ""), (self.skipped, "leaves out", ": what they lead to is read already")]
        return [f"{verb} linked folders: {_some(names)}{why}" for names, verb, why in said if names]


def list_files(root: Path) -> Listing:
    """List `root` to its depths. Links to files are files, whether they lead somewhere or not.

    A linked folder is entered under its link's name, unless it holds or lies in one that is read anyway: so nothing is
    read twice, and links that form a ring come to an end. Raises InputError where a folder cannot be listed that is no
    by-product.
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
    except OSError:  # a link to itself, or through a folder that is closed to us
        return False


def _enter(link: str, entered: list[str]) -> bool:
    """Note where a linked folder leads; False where that overlaps with what is read anyway."""
    target = os.path.realpath(link)
    if any(os.path.commonpath([target, other]) in (target, other) for other in entered):
        return False
    entered.append(target)
    return True


def _count(entry: os.DirEntry[str]) -> int:
    """How many files a by-product is; a folder that cannot be listed counts as one."""
    if entry.is_symlink() or not _is_folder(entry):
        return 1
    closed = list[OSError]()
    return sum(len(files) for _, _, files in os.walk(entry.path, onerror=closed.append)) + len(closed)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LINKS_SHOWN} more" if len(names) > LINKS_SHOWN else ""
    return ", ".join(names[:LINKS_SHOWN]) + more
