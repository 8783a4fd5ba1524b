"""The order of samples is a pure function of (seed, position), each epoch exactly once, and never changes."""

import hashlib
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from trainer.data.orders.lanes import LanesOrder
from trainer.data.orders.mixture import BLOCK, MixtureOrder, quotas
from trainer.data.orders.order import GlobalOrder, Order, Selected, sample_ids
from trainer.data.orders.windowed import WindowedOrder

UNEVEN = [7, 1, 0, 12, 3, 30, 5, 5, 1, 20, 9, 3]  # 96 samples
BATCH = 12


def windowed(sizes: list[int], seed: int, window: int = 3) -> WindowedOrder:
    return WindowedOrder(sizes, window=window, seed=seed)


def in_lanes(sizes: list[int], seed: int, lanes: int = 4) -> LanesOrder:
    return LanesOrder(sizes, lanes=lanes, global_batch=BATCH, window=2, seed=seed)


def everywhere(sizes: list[int], seed: int) -> GlobalOrder:
    return GlobalOrder(sum(sizes), seed)


ORDERS = [everywhere, windowed, in_lanes]
MakeOrder = Callable[[list[int], int], Order]


@pytest.mark.parametrize("make", ORDERS)
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 21, 64, 1000, 4097])
def test_every_epoch_holds_every_sample_once(make: MakeOrder, samples: int) -> None:
    """Shards of 10 and a rest: of 1, as many as fit, and with 1 or 2 samples fewer than there are lanes."""
    sizes = [10] * (samples // 10) + [samples % 10]
    ids = make(sizes, 7).ids(np.arange(3 * samples)).reshape(3, samples)
    assert (np.sort(ids, axis=1) == np.arange(samples)).all()


@pytest.mark.parametrize("make", ORDERS)
def test_uneven_and_empty_shards_come_once_too(make: MakeOrder) -> None:
    ids = make(UNEVEN, 7).ids(np.arange(40 * 96)).reshape(40, 96)
    assert (np.sort(ids, axis=1) == np.arange(96)).all()


@pytest.mark.parametrize("make", ORDERS)
def test_any_part_of_the_order_can_be_asked_for_alone(make: MakeOrder) -> None:
    whole = make(UNEVEN, 1).ids(np.arange(500))
    assert (make(UNEVEN, 1).ids(np.arange(333, 400)) == whole[333:400]).all()
    assert (make(UNEVEN, 1).ids([499, 0, 250]) == whole[[499, 0, 250]]).all()


@pytest.mark.parametrize("make", ORDERS)
def test_epochs_and_seeds_are_shuffled_differently(make: MakeOrder) -> None:
    n = 12_000  # a multiple of the batch: an epoch takes each lane from its beginning
    sizes = [100] * 120
    first, second = make(sizes, 0).ids(np.arange(2 * n)).reshape(2, n)
    other_seed = make(sizes, 1).ids(np.arange(n))
    for one, other in ((first, second), (first, other_seed)):
        assert abs(np.corrcoef(one, other)[0, 1]) < (0.04 if make is everywhere else 0.4)  # 4 deviations; 120 shards
        assert (one == other).mean() < 0.002


def test_neighbours_of_the_global_order_are_no_neighbours() -> None:
    first = sample_ids(np.arange(10_000), 10_000, seed=0)
    for one, other in ((first, np.arange(10_000)), (first[1:], first[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.04


@pytest.mark.parametrize("order", [GlobalOrder(8, 5), windowed([3, 1, 4], 5)], ids=["global", "one window"])
def test_every_sample_comes_everywhere(order: Order) -> None:
    """Place of one sample over many epochs: uniform by a chi-squared test (7 degrees of freedom, p > 1e-4)."""
    ids = order.ids(np.arange(8 * 2000)).reshape(2000, 8)
    for sample in range(8):
        counts = np.bincount(np.nonzero(ids == sample)[1], minlength=8)
        assert ((counts - 250) ** 2 / 250).sum() < 29.9


def test_windows_read_few_shards_at_a_time() -> None:
    order = windowed([50] * 20, 3, window=4)
    shards = order.ids(np.arange(1000)) // 50
    for first in range(0, 1000, 200):
        window = shards[first : first + 200]
        assert len(np.unique(window)) == 4
        assert len(np.unique(window[:50])) == 4  # from the start, all of them


def test_a_node_reads_only_its_lanes_in_every_epoch() -> None:
    """Two nodes of a batch of 12 in 4 lanes: each reads half of 100 shards, and no more than a few of the other's."""
    order = in_lanes([13, 8, 10, 9] * 25, 3)
    positions = np.arange(5 * order.samples)
    shards = np.searchsorted(np.cumsum([13, 8, 10, 9] * 25), order.ids(positions), side="right")
    first_node = positions % BATCH < BATCH // 2
    one, other = set(shards[first_node]), set(shards[~first_node])
    assert one | other == set(range(100))
    assert len(one & other) <= 3  # the shard on the cut, which moves by fewer than 12 samples an epoch
    assert abs(len(one) - 50) <= 4


def test_held_out_samples_never_come() -> None:
    selected = np.array([3, 4, 8, 90], dtype=np.uint32)
    order = Selected(GlobalOrder(4, seed=1), selected)
    assert (np.sort(order.ids(np.arange(40)).reshape(10, 4), axis=1) == selected).all()


def mixture() -> MixtureOrder:
    orders = [GlobalOrder(21, 1), windowed(UNEVEN, 2), GlobalOrder(5, 3)]
    return MixtureOrder(orders, weights=[0.5, 0.3, 0.2], id_starts=[0, 21, 117], seed=4)


def test_a_mixture_has_exact_proportions_in_every_block() -> None:
    ids = mixture().ids(np.arange(7 * BLOCK)).reshape(7, BLOCK)
    owners = np.searchsorted([21, 117], ids, side="right")
    assert [[int((block == k).sum()) for k in range(3)] for block in owners] == [[500, 300, 200]] * 7
    assert (owners[0] != owners[1]).any()


def test_each_dataset_of_a_mixture_keeps_its_own_epochs() -> None:
    ids = mixture().ids(np.arange(3 * BLOCK))
    for order, first in zip(mixture().orders, (0, 21, 117)):
        own = ids[(ids >= first) & (ids < first + order.samples)] - first
        assert (own == order.ids(np.arange(len(own)))).all()  # nothing skipped, nothing twice, in its own order


def test_any_part_of_a_mixture_can_be_asked_for_alone() -> None:
    whole = mixture().ids(np.arange(2500))
    assert (mixture().ids(np.arange(900, 2100)) == whole[900:2100]).all()
    assert (mixture().ids([2400, 3, 1000]) == whole[[2400, 3, 1000]]).all()


def test_weights_are_thousandths() -> None:
    assert quotas([1, 1, 1]) == [334, 333, 333]
    assert quotas([0.25, 0.75]) == [250, 750]
    assert quotas([0.999, 0.001]) == [999, 1]
    with pytest.raises(ValueError, match="less than a 1000th"):
        quotas([1, 0.0001])


SHARDS = [4096 - 7 * (n % 5) for n in range(743)]  # 3,032,926 samples
TWO = [GlobalOrder(3_033_042, 1), GlobalOrder(30_000, 2)]


@pytest.mark.parametrize(
    ("order", "first", "pinned"),
    [
        (GlobalOrder(3_033_042, 42), 2**20, "f40d4df998567f06b4e56d3572c86cd11daa79a9af8508c0da0699844b9b6991"),
        (
            WindowedOrder(SHARDS, window=8, seed=42),
            3_030_000,
            "10aaa21c93675ebe0c4da6cbb65b4d3446c2aa562a5387242fae70d62b6320a5",
        ),  # into the second epoch
        (
            LanesOrder(SHARDS, lanes=16, global_batch=64, window=4, seed=42),
            3_030_000,
            "ccccf8ded036375b1c3f7208bacd8683ba4fdf191ebba1a8f43e6a9c466ca625",
        ),
        (
            MixtureOrder(TWO, weights=[0.9, 0.1], id_starts=[0, 3_033_042], seed=42),
            2**20,
            "311f4cdf3b4a3d5a0fb0aea7e80d9fd49329d9575a99786b82942363f495eff9",
        ),
    ],
    ids=["global", "windowed", "lanes", "mixture"],
)
def test_the_order_is_pinned_for_ever(order: Order, first: int, pinned: str) -> None:
    """A changed order would break the resuming of every run: never update these hashes."""
    ids = order.ids(np.arange(first, first + 4096))
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == pinned


@pytest.mark.parametrize("kind", ["windowed", "lanes"])
def test_threads_may_ask_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and the prefetcher, at more epochs than the order keeps; what is kept is cheap here, to ask often."""
    if kind == "windowed":
        monkeypatch.setattr("trainer.data.orders.windowed.Windows", lambda *_, key, window: (key, window))
        order = windowed([2, 1, 3], 7)
        kept = [lambda epoch=epoch: order._windows(epoch) for epoch in range(4)]
    else:
        monkeypatch.setattr(LanesOrder, "_cut", lambda _, epoch, lane: (epoch, lane))
        lanes = in_lanes([2, 1, 3], 7, lanes=1)
        kept = [lambda epoch=epoch: lanes._windows(epoch, 0) for epoch in range(4)]
    expected = [ask() for ask in kept]
    wrong = []

    def ask_often(first: int) -> None:
        try:
            for n in range(20_000):
                if kept[(first + n) % 4]() != expected[(first + n) % 4]:
                    wrong.append("another epoch's")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=ask_often, args=(n,)) for n in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
