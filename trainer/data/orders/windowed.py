"""The windowed order: shards in a keyed order, and samples shuffled within windows of a few shards.

At any time a rank reads only the shards of one window, so a cache needs to hold about two windows. With a window of all
shards the shuffle is as good as `global`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.data.orders.order import Int64Array
from trainer.data.orders.permutation import derive_key, permute

_WINDOWED = 0x77696E646F776564  # "windowed": distinguishes its keys from those of other orders


class WindowedOrder:
    """The windowed order, see the module. Shards may hold any number of samples; ids run through the shards."""

    def __init__(self, shard_sizes: Sequence[int], *, window: int, seed: int) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.samples = int(self.sizes.sum())
        self.window = window
        self.seed = seed
        self._epochs: dict[int, Windows] = {}

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """Implements `Order.ids`; ids are 0..N-1."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        ids = np.empty(places.shape, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self._windows(int(epoch)).ids(places[chosen])
        return ids

    def _windows(self, epoch: int) -> "Windows":
        known = self._epochs  # replaced, never modified: the prefetcher's thread reads it too
        if epoch in known:
            return known[epoch]
        made = Windows(self.starts, self.sizes, window=self.window, key=derive_key(self.seed, _WINDOWED, epoch))
        self._epochs = dict([*known.items(), (epoch, made)][-2:])  # a stream needs this epoch and the next
        return made


class Windows:
    """Sections of shards in a keyed order; within each window of `window` sections, their samples in a keyed order.

    starts, sizes: (P,) int64, each section's first id and number of samples, which may be 0.
    """

    def __init__(self, starts: Int64Array, sizes: Int64Array, *, window: int, key: int) -> None:
        pieces = permute(np.arange(len(sizes)), len(sizes), key)
        self.key = key
        self.starts = starts[pieces]
        self.piece_bounds = np.concatenate([[0], np.cumsum(sizes[pieces])])
        self.window_bounds = np.append(self.piece_bounds[:-1:window], self.piece_bounds[-1])

    def ids(self, places: Int64Array) -> Int64Array:
        """places: (B,) in [0, sum of sizes). Returns (B,) ids."""
        windows = np.searchsorted(self.window_bounds, places, side="right") - 1
        mixed = np.empty_like(places)
        for window in np.unique(windows):
            chosen = windows == window
            first, last = self.window_bounds[window : window + 2].tolist()
            mixed[chosen] = first + permute(places[chosen] - first, last - first, derive_key(self.key, int(window)))
        pieces = np.searchsorted(self.piece_bounds, mixed, side="right") - 1
        return self.starts[pieces] + mixed - self.piece_bounds[pieces]
