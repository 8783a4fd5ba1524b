"""Keyed permutations of 0..n-1 that can be evaluated at single places.

They depend on no library's random generator, whose stream may change between versions.
"""

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_ROUNDS = 8
_MASK64 = (1 << 64) - 1


def permute(places: npt.ArrayLike, n: int, key: int) -> npt.NDArray[np.int64]:
    """The images of the places under the permutation with this key.

    places: (B,) integers in [0, n); n >= 1; key: any integer, taken modulo 2^64. Returns (B,) int64 in [0, n).

    A Feistel network over the smallest even number of bits that holds n, iterated until the result is in 0..n-1. This
    "cycle walking" (Black and Rogaway 2002) makes it a permutation of exactly 0..n-1; the domain is smaller than 4 n,
    so there are fewer than 4 iterations on average.
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(_mix_int(key + round_)) for round_ in range(_ROUNDS)]
    out = _feistel(np.asarray(places, dtype=np.uint64), half_bits, round_keys)
    while True:
        outside = out >= np.uint64(n)
        if not outside.any():
            return out.astype(np.int64)
        out[outside] = _feistel(out[outside], half_bits, round_keys)


def derive_key(*parts: int) -> int:
    """A 64-bit key from several integers; their order matters."""
    key = 0
    for part in reversed(parts):
        key = _mix_int(part ^ key)
    return key


def mix(values: UInt64Array) -> UInt64Array:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    """`mix` of one integer; ten times as fast as with an array of one."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _feistel(values: UInt64Array, half_bits: int, round_keys: list[np.uint64]) -> UInt64Array:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in round_keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right
