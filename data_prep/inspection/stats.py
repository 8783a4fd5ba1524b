"""Pixel statistics of a finished dataset, for the evaluation of models.

`stats.npz` holds, with pixels scaled to x = v / 127.5 - 1 as the trainer does, C channels and H = W = the image size:

    count          ()         int64    images
    fingerprint    ()         str      Manifest.fingerprint of the dataset
    mean_image     (C, H, W)  float64  E[x]
    mean_square    (C, H, W)  float64  E[x^2]; with it, L_T = KL(q(x_T | x_0) || N(0, I)) has a closed form
    channel_mean   (C,)       float64  E[x] over images and pixels
    channel_std    (C,)       float64  sqrt(E[x^2] - E[x]^2) over images and pixels
    histogram      (C, 256)   int64    how often each value v occurs

All are computed from integer sums, so they are exact and independent of order and number of threads. Network features,
as for FID, are not included.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from data_prep.format import STATS_NAME
from data_prep.inspection.dataset import Dataset
from data_prep.output import claimed, discard_staging, whole_file
from data_prep.progress import WorkProgress

VALUES = 256
CHUNK = 64  # images per task


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over images of v and v^2, (C, H, W) int64; `histogram`: (C, 256) int64; values v are 0..255.

    int64 does not overflow below 10^14 images.
    """

    count: int
    values: npt.NDArray[np.int64]
    squares: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]

    def __add__(self, other: Self) -> "Sums":
        return Sums(*(ours + theirs for ours, theirs in zip(vars(self).values(), vars(other).values())))


@dataclass(frozen=True, kw_only=True, eq=False)
class Stats:
    """The content of stats.npz; see the module."""

    count: int
    fingerprint: str
    mean_image: npt.NDArray[np.float64]
    mean_square: npt.NDArray[np.float64]
    channel_mean: npt.NDArray[np.float64]
    channel_std: npt.NDArray[np.float64]
    histogram: npt.NDArray[np.int64]


def write_stats(dataset: Dataset, *, workers: int) -> Stats:
    """Compute the statistics and write them to stats.npz.

    Raises InputError where a sample cannot be read and DataPrepError where the folder cannot be written.
    """
    with claimed(dataset.folder) as staging:
        stats = stats_of(_sums(dataset, workers), dataset.manifest.fingerprint)
        with whole_file(dataset.folder / STATS_NAME, staging) as stream:
            arrays = {name: np.asarray(value) for name, value in vars(stats).items()}
            np.savez(stream, **arrays)  # type: ignore[arg-type] # one of its options is a bool
        discard_staging(dataset.folder)
    return stats


def stats_of(sums: Sums, fingerprint: str) -> Stats:
    """Means from sums: E[x] = E[v] / 127.5 - 1, E[x^2] = E[v^2] / 127.5^2 - 2 E[v] / 127.5 + 1."""
    scaled = sums.values / sums.count / 127.5
    mean_image = scaled - 1
    mean_square = sums.squares / sums.count / 127.5**2 - 2 * scaled + 1
    channel_mean = mean_image.mean(axis=(1, 2))
    variance = mean_square.mean(axis=(1, 2)) - channel_mean**2
    return Stats(
        count=sums.count,
        fingerprint=fingerprint,
        mean_image=mean_image,
        mean_square=mean_square,
        channel_mean=channel_mean,
        channel_std=np.sqrt(np.maximum(variance, 0)),  # rounding may result in -1e-17 for constant images
        histogram=sums.histogram,
    )


def _sums(dataset: Dataset, workers: int) -> Sums:
    manifest = dataset.manifest
    shape = (manifest.channels, manifest.image_size, manifest.image_size)
    total = Sums(0, np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros((shape[0], VALUES), np.int64))
    tasks = [range(first, min(first + CHUNK, manifest.samples)) for first in range(0, manifest.samples, CHUNK)]
    with (
        ThreadPoolExecutor(workers) as pool,  # threads, since decoding releases the GIL
        WorkProgress(total=manifest.samples, what="measuring", unit="img") as progress,
    ):
        # A few tasks at a time: each needs three arrays of the images' size.
        for batch in (tasks[start : start + workers] for start in range(0, len(tasks), workers)):
            for sums in pool.map(lambda samples: _sums_of(dataset, samples), batch):
                total += sums
                progress.update(sums.count)
    return total


def _sums_of(dataset: Dataset, samples: range) -> Sums:
    decoded = (np.atleast_3d(np.asarray(dataset.read(sample))) for sample in samples)
    images = np.stack([image.transpose(2, 0, 1) for image in decoded])  # (N, C, H, W)
    channels = images.shape[1]
    squares = np.zeros(images.shape[1:], np.int64)
    for image in images:
        squares += image.astype(np.uint16) ** 2
    histogram = [np.bincount(images[:, channel].ravel(), minlength=VALUES) for channel in range(channels)]
    return Sums(len(images), images.sum(axis=0, dtype=np.int64), squares, np.stack(histogram).astype(np.int64))
