"""Held-out samples: which ones is decided by what a sample is, so it stays with the sample for ever."""

import numpy as np
import numpy.typing as npt

from trainer.data.permutation import mix

_HOLDOUT = np.uint64(0x686F6C646F7574)  # "holdout": apart from whatever else is hashed


def is_held_out(keys: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """keys: (N,) `split_keys` of a dataset; fraction in [0, 1). Returns (N,), true for about fraction x N of them.

    A larger fraction holds out the same samples and more. Neither seed nor order nor the other samples matter.
    """
    return mix(mix(keys ^ _HOLDOUT)) < np.uint64(int(fraction * 2.0**64))
