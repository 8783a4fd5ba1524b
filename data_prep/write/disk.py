"""Estimates the size of a dataset before it is built."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import InputError, Reject
from data_prep.format import INDEX_DTYPE, MEMBER_DTYPE
from data_prep.recipe import Recipe
from data_prep.write.images import pillow_is_quiet
from data_prep.write.writer import ShardPlan, convert_sample

TRIALS = 32  # sizes of photos vary by about half their mean, so the mean of 32 is accurate to a tenth
TOLERANCE = 0.8  # share of the estimate that must be free: an estimate's error must not refuse what would fit
TAR_BLOCK = 512
BYTES_BESIDE_A_MEMBER = TAR_BLOCK + TAR_BLOCK // 2 + MEMBER_DTYPE.itemsize  # header, padding, index
BYTES_BESIDE_AN_IMAGE = TAR_BLOCK + TAR_BLOCK // 2 + INDEX_DTYPE.itemsize + 64  # and the name


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes: `needed` (an estimate), and `free` now."""

    needed: int
    free: int


def check_room(missing: Sequence[ShardPlan], recipe: Recipe, out: Path) -> Room:
    """Estimate the size of the missing shards from a few evenly spaced images.

    Raises InputError where the disk has too little room or the source as a whole is unreadable, and DataPrepError where
    memory is insufficient for an image.
    """
    ends = np.cumsum([len(plan.source.names) for plan in missing])
    total = int(ends[-1])
    trials = np.unique(np.linspace(0, total - 1, min(total, TRIALS)).astype(int))
    taken = 0
    for position in trials:
        chosen = int(np.searchsorted(ends, position, side="right"))
        plan = missing[chosen]
        with pillow_is_quiet():
            taken += _bytes_of(plan, int(position - ends[chosen]) + len(plan.source.names), recipe)
    room = Room(needed=taken * total // len(trials), free=shutil.disk_usage(out).free)
    if room.needed * TOLERANCE > room.free:
        raise InputError(
            f"{out}: needs about {readable(room.needed)}, {readable(room.free)} are free; "
            "make room or give a folder on another disk"
        )
    return room


def readable(count: int) -> str:
    """Bytes in decimal units: "31.4 GB"."""
    size, units = float(count), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.1f} {units[0]}"


def _bytes_of(plan: ShardPlan, i: int, recipe: Recipe) -> int:
    try:
        image, further = convert_sample(plan, i, recipe)
    except Reject:
        return 0
    beside = sum(len(data) + BYTES_BESIDE_A_MEMBER for _, data in further.values())
    return len(image.data) + BYTES_BESIDE_AN_IMAGE + beside
