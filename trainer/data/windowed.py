"""The windowed order: shards in a keyed order, and samples mixed among a few shards at a time.

A rank reads only the shards of one window for a while, so a cache needs to hold about two windows. With a window of all
shards it is as good a shuffle as `global`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.data.order import Int64Array
from trainer.data.permutation import derive_key, permute

_WINDOWED = 0x77696E646F776564  # "windowed": apart from the keys of the other orders


class WindowedOrder:
    """See the module. Shards may hold any number of samples; ids are numbered through the shards in turn."""

    def __init__(self, shard_sizes: Sequence[int], *, window: int, seed: int) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.samples = int(self.sizes.sum())
        self.window = window
        self.seed = seed
        self._epochs: dict[int, Windows] = {}

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """See `Order`; ids are 0..N-1."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        ids = np.empty(places.shape, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self._windows(int(epoch)).ids(places[chosen])
        return ids

    def _windows(self, epoch: int) -> "Windows":
        known = self._epochs  # replaced, never changed: the prefetcher's thread asks too
        if epoch in known:
            return known[epoch]
        made = Windows(self.starts, self.sizes, window=self.window, key=derive_key(self.seed, _WINDOWED, epoch))
        self._epochs = dict([*known.items(), (epoch, made)][-2:])  # a stream looks at this epoch and the next
        return made


class Windows:
    """Pieces of shards in a keyed order; in each run of `window` pieces, their samples in a keyed order.

    starts, sizes: (P,) int64, each piece's first id and number of samples, which may be 0.
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
