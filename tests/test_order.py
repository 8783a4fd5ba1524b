"""The order of samples is a pure function of (seed, position), each epoch exactly once, and never changes."""

import hashlib

import numpy as np
import pytest

from trainer.data.order import sample_ids


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 21, 64, 1000, 4097])
def test_every_epoch_holds_every_sample_once(samples: int) -> None:
    ids = sample_ids(np.arange(3 * samples), samples, seed=7).reshape(3, samples)
    assert (np.sort(ids, axis=1) == np.arange(samples)).all()


def test_any_part_of_the_order_can_be_asked_for_alone() -> None:
    whole = sample_ids(np.arange(500), 96, seed=1)
    assert (sample_ids(np.arange(333, 400), 96, seed=1) == whole[333:400]).all()
    assert (sample_ids([499, 0, 250], 96, seed=1) == whole[[499, 0, 250]]).all()


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    n = 10_000
    first, second = sample_ids(np.arange(2 * n), n, seed=0).reshape(2, n)
    other_seed = sample_ids(np.arange(n), n, seed=1)
    for one, other in ((first, second), (first, other_seed), (first, np.arange(n)), (first[1:], first[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.04  # four standard deviations


def test_every_sample_comes_everywhere() -> None:
    """Place of one sample over many epochs: uniform by a chi-squared test (7 degrees of freedom, p > 1e-4)."""
    ids = sample_ids(np.arange(8 * 4000), 8, seed=5).reshape(4000, 8)
    for sample in range(8):
        counts = np.bincount(np.nonzero(ids == sample)[1], minlength=8)
        assert ((counts - 500) ** 2 / 500).sum() < 29.9


def test_the_order_is_pinned_for_ever() -> None:
    """A changed order would break the resuming of every run: never update this hash."""
    ids = sample_ids(np.arange(2**20, 2**20 + 4096), 3_033_042, seed=42)
    pinned = "f40d4df998567f06b4e56d3572c86cd11daa79a9af8508c0da0699844b9b6991"
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == pinned
