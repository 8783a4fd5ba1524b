"""The order of samples: a pure function of (seed, position), so that the state of the data pipeline is one integer.

Position p counts images consumed since the run began. Epoch and place within it are divmod(p, N), and the place is
mapped to a sample by a permutation of 0..N-1 keyed by (seed, epoch). All samples before and after p are thus determined
by p, for any number of ranks and loader workers.

This module has the interface of orders and the simplest one, `global`; orders that read fewer shards at a time are in
`windowed.py` and `lanes.py`, mixtures of datasets in `mixture.py`.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from trainer.data.orders.permutation import derive_key, permute

Int64Array = npt.NDArray[np.int64]


class Order(Protocol):
    """Maps positions to samples. Each run of N positions that starts at a multiple of N contains each sample once."""

    samples: int  # N, per epoch

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """positions: (B,) integers >= 0. Returns the samples' ids, (B,) int64."""


class GlobalOrder:
    """A permutation of all samples, a different one each epoch: the best shuffle, for data on every node's disk."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """Implements `Order.ids`; ids are 0..N-1."""
        return sample_ids(positions, self.samples, self.seed)


class Selected:
    """Another order over a subset: its ids are mapped to the `selected` samples; no other sample occurs."""

    def __init__(self, order: Order, selected: npt.NDArray[np.uint32]) -> None:
        self.samples = order.samples
        self.order = order
        self.selected = selected

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """Implements `Order.ids`; ids are those in `selected`."""
        return self.selected[self.order.ids(positions)].astype(np.int64)


def sample_ids(positions: npt.ArrayLike, samples: int, seed: int) -> Int64Array:
    """The sample at each position of the global order.

    positions: (B,) integers >= 0; samples: N >= 1. Returns (B,) int64 in [0, N). Each run of N positions that starts at
    a multiple of N contains every sample exactly once.
    """
    if samples < 1:
        raise ValueError(f"samples = {samples}: should be at least 1")
    epochs, places = np.divmod(np.asarray(positions, dtype=np.uint64), np.uint64(samples))
    ids = np.empty(places.shape, dtype=np.int64)
    for epoch in np.unique(epochs):  # one or two per batch; more if the dataset is smaller than the batch
        chosen = epochs == epoch
        ids[chosen] = permute(places[chosen], samples, derive_key(seed, int(epoch)))
    return ids
