"""The order "lanes": of C parts of the dataset a node reads those that its part of the global batch takes.

Slot j of a global batch of B belongs to lane j C / B, so of n nodes (C divisible by n) each reads C / n lanes, the same
ones in every epoch. The order does not depend on the number of nodes.

Epoch e is positions e N to (e + 1) N. In it lane c has S_c(e) slots, which may differ between lanes, so the dataset
(its shards in an order keyed by the seed) is cut after S_0, S_0 + S_1, ... samples, and each lane shuffles its section
like the windowed order. Each epoch thus contains each sample exactly once, for any N, B and shard sizes. The cuts move
by fewer than B samples from epoch to epoch, so only shards at a cut are read by two lanes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.data.orders.order import Int64Array
from trainer.data.orders.permutation import derive_key, permute
from trainer.data.orders.windowed import Windows

_LANES = 0x6C616E6573  # "lanes": distinguishes its keys from those of other orders


class LanesOrder:
    """The order of lanes, see the module. Shards may hold any number of samples; ids run through the shards."""

    def __init__(self, shard_sizes: Sequence[int], *, lanes: int, global_batch: int, window: int, seed: int) -> None:
        if global_batch % lanes:
            raise ValueError(f"lanes = {lanes}: should divide global_batch = {global_batch}")
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        shards = permute(np.arange(len(sizes)), len(sizes), derive_key(seed, _LANES))
        self.samples = int(sizes.sum())
        self.starts = (np.cumsum(sizes) - sizes)[shards]
        self.bounds = np.concatenate([[0], np.cumsum(sizes[shards])])
        self.lanes = lanes
        self.global_batch = global_batch
        self.window = window
        self.seed = seed
        self._stretches: dict[tuple[int, int], Windows] = {}

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """Implements `Order.ids`; ids are 0..N-1."""
        asked = np.asarray(positions, dtype=np.int64)
        epochs, lanes = asked // self.samples, asked % self.global_batch * self.lanes // self.global_batch
        ids = np.empty(asked.shape, dtype=np.int64)
        for epoch, lane in np.unique(np.stack([epochs, lanes], axis=1), axis=0).tolist():
            chosen = (epochs == epoch) & (lanes == lane)
            places = self._slots_before(asked[chosen], lane) - self._slots_before(epoch * self.samples, lane)
            ids[chosen] = self._windows(epoch, lane).ids(np.asarray(places))
        return ids

    def _slots_before(self, position: npt.ArrayLike, lane: npt.ArrayLike) -> Int64Array:
        """Number of positions before this one that belong to the lane."""
        width = self.global_batch // self.lanes
        batches, slot = np.divmod(np.asarray(position, dtype=np.int64), self.global_batch)
        return np.asarray(batches * width + np.clip(slot - np.asarray(lane) * width, 0, width))

    def _windows(self, epoch: int, lane: int) -> Windows:
        known, asked = self._stretches, (epoch, lane)  # replaced, never modified: the prefetcher's thread reads it too
        if asked in known:
            return known[asked]
        made = self._cut(epoch, lane)
        self._stretches = dict([*known.items(), (asked, made)][-2 * self.lanes :])  # of this epoch and the next
        return made

    def _cut(self, epoch: int, lane: int) -> Windows:
        every_lane = np.arange(self.lanes)
        begin, end = (self._slots_before((epoch + n) * self.samples, every_lane) for n in (0, 1))
        cuts = np.concatenate([[0], np.cumsum(end - begin)])
        first = np.clip(self.bounds[:-1], cuts[lane], cuts[lane + 1])
        sizes = np.clip(self.bounds[1:], cuts[lane], cuts[lane + 1]) - first
        inside = sizes > 0
        starts = self.starts + first - self.bounds[:-1]
        key = derive_key(self.seed, _LANES, epoch, lane)
        return Windows(starts[inside], sizes[inside], window=self.window, key=key)
