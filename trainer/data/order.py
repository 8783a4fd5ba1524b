"""The order of samples: a pure function of (seed, position), so that the data's state is one integer.

Position p counts images consumed since the run began. Epoch and place in it are divmod(p, N), and the place is
mapped to a sample by a permutation of 0..N-1 keyed by (seed, epoch). Whoever knows p knows every sample that was
ever seen and every sample to come, on any number of ranks and loader workers.

Here is what every order promises and the plain one, `global`; orders that spare downloads are in `windowed.py` and
`lanes.py`, several datasets in `mixture.py`.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from trainer.data.permutation import derive_key, permute

Int64Array = npt.NDArray[np.int64]


class Order(Protocol):
    """Which sample lies at which position. Each run of N positions that starts at a multiple of N holds each once."""

    samples: int  # N, of one epoch

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """positions: (B,) integers >= 0. Returns the samples' ids, (B,) int64."""


class GlobalOrder:
    """A permutation of all samples, another one each epoch: the best shuffle, for data that every node has whole."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """See `Order`; ids are 0..N-1."""
        return sample_ids(positions, self.samples, self.seed)


class Selected:
    """Another order's places, mapped to the samples that were selected: whatever is left out never comes."""

    def __init__(self, order: Order, selected: npt.NDArray[np.uint32]) -> None:
        self.samples = order.samples
        self.order = order
        self.selected = selected

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """See `Order`; ids are those in `selected`."""
        return self.selected[self.order.ids(positions)].astype(np.int64)


def sample_ids(positions: npt.ArrayLike, samples: int, seed: int) -> Int64Array:
    """Which sample lies at each position of the global order.

    positions: (B,) integers >= 0; samples: N >= 1. Returns (B,) int64 in [0, N). Each run of N positions that starts
    at a multiple of N holds every sample exactly once.
    """
    if samples < 1:
        raise ValueError(f"samples = {samples}: should be at least 1")
    epochs, places = np.divmod(np.asarray(positions, dtype=np.uint64), np.uint64(samples))
    ids = np.empty(places.shape, dtype=np.int64)
    for epoch in np.unique(epochs):  # one or two in a batch, more only where the dataset is smaller than the batch
        chosen = epochs == epoch
        ids[chosen] = permute(places[chosen], samples, derive_key(seed, int(epoch)))
    return ids
