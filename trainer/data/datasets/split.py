"""The held-out split: a function of each sample's key alone, so a sample's membership never changes."""

import numpy as np
import numpy.typing as npt

from trainer.data.orders.permutation import mix

_HOLDOUT = np.uint64(0x686F6C646F7574)  # "holdout": distinguishes these hashes from others


def is_held_out(keys: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """keys: (N,) `split_keys` of a dataset; fraction in [0, 1). Returns (N,), true for about fraction x N of them.

    A larger fraction holds out a superset. The result does not depend on seed, order or the other samples.
    """
    return mix(mix(keys ^ _HOLDOUT)) < np.uint64(int(fraction * 2.0**64))
