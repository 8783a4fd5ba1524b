"""The order of samples: a pure function of (seed, position), so that the data's state is one integer.

Position p counts images consumed since the run began. Epoch and place in it are divmod(p, N), and the place is
mapped to a sample by a permutation of 0..N-1 keyed by (seed, epoch). Whoever knows p knows every sample that was
ever seen and every sample to come, on any number of ranks and loader workers.
"""

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_ROUNDS = 8
_MASK64 = (1 << 64) - 1


def sample_ids(positions: npt.ArrayLike, samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Which sample lies at each position.

    positions: (B,) integers >= 0; samples: N >= 1. Returns (B,) int64 in [0, N). Each run of N positions that starts
    at a multiple of N holds every sample exactly once.
    """
    if samples < 1:
        raise ValueError(f"samples = {samples}: should be at least 1")
    epochs, places = np.divmod(np.asarray(positions, dtype=np.uint64), np.uint64(samples))
    ids = np.empty(places.shape, dtype=np.int64)
    for epoch in np.unique(epochs):  # one or two in a batch, more only where the dataset is smaller than the batch
        chosen = epochs == epoch
        ids[chosen] = _permute(places[chosen], samples, seed, int(epoch)).astype(np.int64)
    return ids


def _permute(places: UInt64Array, samples: int, seed: int, epoch: int) -> UInt64Array:
    """A Feistel network over the smallest even number of bits that holds N, walked until it lands inside 0..N-1.

    The walk ("cycle walking", Black and Rogaway 2002) keeps it a permutation of exactly 0..N-1; the domain is less
    than 4 N, so a place is walked fewer than 4 times on average. Nothing depends on a library's generator, whose
    stream may change with its version.
    """
    half_bits = max(1, ((samples - 1).bit_length() + 1) // 2)
    key = _mix_int(seed ^ _mix_int(epoch))
    round_keys = [np.uint64(_mix_int(key + round_)) for round_ in range(_ROUNDS)]
    out = _feistel(places, half_bits, round_keys)
    while True:
        outside = out >= np.uint64(samples)
        if not outside.any():
            return out
        out[outside] = _feistel(out[outside], half_bits, round_keys)


def _feistel(values: UInt64Array, half_bits: int, round_keys: list[np.uint64]) -> UInt64Array:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: UInt64Array) -> UInt64Array:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    return int(_mix(np.array([value & _MASK64], dtype=np.uint64))[0])
