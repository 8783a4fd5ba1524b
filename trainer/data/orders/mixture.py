"""A mixture of datasets: each has its share of the positions, and its own epochs.

Positions are grouped in blocks of 1000. In every block a dataset has a fixed number of slots, its weight in
thousandths, assigned by a permutation keyed by (seed, block). The number of a dataset's slots before a position,
computed from whole blocks plus a count within one, is the position in that dataset's own order.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.data.orders.order import Int64Array, Order
from trainer.data.orders.permutation import derive_key, permute

BLOCK = 1000
_MIXTURE = 0x6D697874757265  # "mixture": distinguishes its keys from those of other orders


class MixtureOrder:
    """The order of a mixture, see the module. Samples of dataset k have the ids from `id_starts[k]` on.

    It has no epoch, unlike an `Order`; `samples` is the total over the datasets.
    """

    def __init__(
        self, orders: Sequence[Order], *, weights: Sequence[float], id_starts: Sequence[int], seed: int
    ) -> None:
        self.orders = list(orders)
        self.id_starts = list(id_starts)
        self.samples = sum(order.samples for order in orders)
        self.quotas = quotas(weights)
        self.seed = seed
        self._dealt = np.repeat(np.arange(len(orders)), self.quotas)  # (BLOCK,) dataset of each slot, unpermuted

    def ids(self, positions: npt.ArrayLike) -> Int64Array:
        """positions: (B,) integers >= 0. Returns (B,) int64."""
        blocks, slots = np.divmod(np.asarray(positions, dtype=np.int64), BLOCK)
        ids = np.empty(blocks.shape, dtype=np.int64)
        for block in np.unique(blocks).tolist():
            in_block = blocks == block
            owners = self._dealt[permute(np.arange(BLOCK), BLOCK, derive_key(self.seed, _MIXTURE, block))]
            for dataset in np.unique(owners[slots[in_block]]).tolist():
                mine = owners == dataset
                chosen = in_block & mine[slots]
                own_positions = block * self.quotas[dataset] + np.cumsum(mine)[slots[chosen]] - 1
                ids[chosen] = self.id_starts[dataset] + self.orders[dataset].ids(own_positions)
        return ids


def quotas(weights: Sequence[float]) -> list[int]:
    """Slots of each dataset in a block of BLOCK, proportional to the weights, by the largest remainder method.

    Raises ValueError where a dataset's share would be 0.
    """
    shares = np.asarray(weights, dtype=np.float64) * BLOCK / math.fsum(weights)
    slots = np.floor(shares).astype(int)
    remainders = shares - slots
    for dataset in np.argsort(-remainders, kind="stable")[: BLOCK - slots.sum()]:
        slots[dataset] += 1
    if (slots == 0).any():
        raise ValueError(f"a weight is less than a {BLOCK}th of the sum of the weights, so its images would never come")
    return [int(count) for count in slots]


def member_seed(seed: int, dataset: int) -> int:
    """Seed of one dataset's own order: equal datasets in a mixture get different orders."""
    return derive_key(seed, _MIXTURE, ~dataset)
