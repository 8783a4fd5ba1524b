"""The cache of a node stays in its bounds, keeps what the plan needs next, and fetches it ahead."""

import fcntl
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cache_harness import cached, cached_bytes, pinned, wait_until
from tests.harness import load_config
from tests.server import FaultyServer
from trainer.data.cache.node_cache import NodeCache
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.orders.windowed import WindowedOrder
from trainer.data.stream.prefetch import Prefetcher
from trainer.data.stream.stream import BatchLayout, MicroBatchPlan, micro_batches
from trainer.data.training_data import open_training_data
from trainer.errors import ConfigError, DataError


def test_the_cache_stays_in_its_bounds_and_drops_what_was_not_read_for_longest(
    server: FaultyServer, many_shards: Path, tmp_path: Path
) -> None:
    size = max(record.bytes for record in ShardedDataset(many_shards).manifest.shards)
    dataset = cached(server, many_shards, tmp_path, limit=4 * size)
    for shard in (0, 1, 2, 3):
        dataset.read(4 * shard)
        time.sleep(0.01)
    dataset.close()
    dataset.read(0)  # by now the newest
    for shard in (4, 5):
        dataset.read(4 * shard)
        assert cached_bytes(tmp_path) <= 4 * size
    kept = {path.name for path in (tmp_path / "cache" / "shards").iterdir()}
    assert kept == {dataset.shards[n].digest for n in (0, 3, 4, 5)}


def test_deleted_shards_do_not_stay_open(server: FaultyServer, many_shards: Path, tmp_path: Path) -> None:
    size = max(record.bytes for record in ShardedDataset(many_shards).manifest.shards)
    dataset = cached(server, many_shards, tmp_path, limit=3 * size)
    for sample in range(48):
        dataset.read(sample)
    assert len(dataset._descriptors) <= 4


def test_a_cache_that_is_too_small_says_so(server: FaultyServer, many_shards: Path, tmp_path: Path) -> None:
    dataset = cached(server, many_shards, tmp_path, limit=100)
    with pytest.raises(DataError, match=r"data\.cache_size = 100 bytes: too small; 0 bytes are in use .* needs \d+"):
        dataset.read(0)


def test_pinned_shards_are_not_dropped(server: FaultyServer, many_shards: Path, tmp_path: Path) -> None:
    """Nor may more than half of the cache be pinned, so that there is always room to read."""
    size = max(shard.bytes for shard in ShardedDataset(many_shards).shards)
    dataset = cached(server, many_shards, tmp_path, limit=4 * size)
    cache = dataset.files
    assert isinstance(cache, NodeCache)
    pins = [cache.pin(dataset.shards[n]) for n in (0, 1)]
    assert cache.pin(dataset.shards[2]) is None
    assert server.gets["shard-000002.tar"] == 0
    for sample in range(8, 48):
        dataset.read(sample)
    kept = {path.name for path in cache.shards.iterdir()}
    assert {dataset.shards[0].digest, dataset.shards[1].digest} < kept
    again = cache.pin(dataset.shards[1])  # twice takes no more room
    assert pins[0] is not None
    assert again is not None
    cache.unpin(pins[0])
    third = cache.pin(dataset.shards[2])
    assert third is not None
    for sample in range(12, 48):
        dataset.read(sample)
    kept = {path.name for path in cache.shards.iterdir()}
    assert {dataset.shards[1].digest, dataset.shards[2].digest} < kept
    assert dataset.shards[0].digest not in kept


def test_two_jobs_that_prefetch_leave_room_for_a_third_to_read(
    server: FaultyServer, many_shards: Path, tmp_path: Path
) -> None:
    size = max(shard.bytes for shard in ShardedDataset(many_shards).shards)
    jobs = []
    for first in (0, 4):
        dataset = cached(server, many_shards, tmp_path, limit=4 * size)
        assert isinstance(dataset.files, NodeCache)
        jobs.append(
            Prefetcher(
                dataset.files,
                dataset.shards[first : first + 4],
                needs=lambda step: [step],
                micro_steps=range(4),
                in_hand=0,
                budget=dataset.files.limit // 2,
            )
        )
    for job in jobs:
        job.start()
    wait_until(lambda: len(pinned(jobs[0])) + len(pinned(jobs[1])) == 2)
    third = cached(server, many_shards, tmp_path, limit=4 * size)
    for sample in range(32, 48):
        third.read(sample)
    greedy, other = sorted(jobs, key=lambda job: len(pinned(job)), reverse=True)
    greedy.close()  # and the other one goes on
    wait_until(lambda: len(pinned(other)) == 2)
    other.close()


def test_a_reader_waits_while_others_fill_the_cache(server: FaultyServer, many_shards: Path, tmp_path: Path) -> None:
    """Shards that are still being fetched, say; here held by hand."""
    size = max(shard.bytes for shard in ShardedDataset(many_shards).shards)
    dataset = cached(server, many_shards, tmp_path, limit=2 * size)
    assert isinstance(dataset.files, NodeCache)
    held = [dataset.files.open(dataset.shards[n]) for n in (0, 1)]
    for descriptor in held:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    with pytest.raises(DataError, match="too small"):
        dataset.read(8)
    reader = threading.Thread(target=dataset.read, args=(8,))
    reader.start()
    time.sleep(0.3)
    assert reader.is_alive()
    dataset.files.unpin(held[0])
    reader.join(30)
    assert {path.name for path in dataset.files.shards.iterdir()} == {dataset.shards[n].digest for n in (1, 2)}


def test_a_part_without_a_lock_is_deleted_before_its_room_is_taken(
    server: FaultyServer, many_shards: Path, tmp_path: Path
) -> None:
    size = max(shard.bytes for shard in ShardedDataset(many_shards).shards)
    dataset = cached(server, many_shards, tmp_path, limit=2 * size)
    (tmp_path / "cache" / "shards" / "left.part").write_bytes(bytes(2 * size))
    dataset.read(0)
    assert cached_bytes(tmp_path) <= 2 * size


def test_files_that_vanish_while_they_are_counted_do_not_matter(
    server: FaultyServer, many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = cached(server, many_shards, tmp_path)
    dataset.read(0)

    def scan_and_delete(folder: Path) -> list[os.DirEntry[str]]:
        with os.scandir(folder) as found:
            entries = list(found)
        for entry in entries:
            Path(entry.path).unlink()
        return entries

    with monkeypatch.context() as patch:
        patch.setattr("trainer.data.cache.node_cache._scan", scan_and_delete)
        assert dataset.read(5) == ShardedDataset(many_shards).read(5)
    assert server.gets["shard-000001.tar"] == 1


def test_what_cannot_be_fetched_ahead_does_not_end_the_prefetching(
    server: FaultyServer, many_shards: Path, tmp_path: Path
) -> None:
    server.always["shard-000001.tar"] = 404
    dataset = cached(server, many_shards, tmp_path)
    assert isinstance(dataset.files, NodeCache)
    prefetcher = Prefetcher(
        dataset.files, dataset.shards, needs=lambda step: [step], micro_steps=range(4), in_hand=0, budget=10**9
    )
    prefetcher.start()
    wait_until(lambda: pinned(prefetcher) == {0, 2, 3})
    prefetcher.close()


def test_the_plan_is_fetched_ahead_within_its_budget(server: FaultyServer, many_shards: Path, tmp_path: Path) -> None:
    """Shards 0, 1, 2, ... in turn, four micro-steps each; room for three pins in a cache of six."""
    size = max(shard.bytes for shard in ShardedDataset(many_shards).shards)
    dataset = cached(server, many_shards, tmp_path, limit=6 * size)
    assert isinstance(dataset.files, NodeCache)
    prefetcher = Prefetcher(
        dataset.files, dataset.shards, needs=lambda step: [step // 4], micro_steps=range(48), in_hand=0, budget=3 * size
    )
    prefetcher.start()
    wait_until(lambda: pinned(prefetcher) == {0, 1, 2})
    assert sum(server.gets.values()) == 3
    prefetcher.advance(3)  # training is still in shard 0
    time.sleep(0.1)
    assert pinned(prefetcher) == {0, 1, 2}
    prefetcher.advance(9)  # in shard 2
    wait_until(lambda: pinned(prefetcher) == {2, 3, 4})
    prefetcher.close()
    wait_until(lambda: not prefetcher._thread.is_alive())
    assert not pinned(prefetcher)


def test_a_stream_through_a_small_cache_is_the_same_and_fetches_each_shard_once_an_epoch(
    server: FaultyServer, many_shards: Path, tmp_path: Path
) -> None:
    size = max(shard.bytes for shard in ShardedDataset(many_shards).shards)
    dataset = cached(server, many_shards, tmp_path, limit=5 * size)
    assert isinstance(dataset.files, NodeCache)
    layout = BatchLayout.plan(8, 1, None)
    order = WindowedOrder([4] * 12, window=2, seed=1)
    plan = MicroBatchPlan(layout, order=order, rank=0, first_step=0, last_step=12)
    prefetcher = Prefetcher(
        dataset.files,
        dataset.shards,
        needs=lambda micro_step: plan.shards(dataset, micro_step),
        micro_steps=plan.micro_steps,
        in_hand=2,
        budget=5 * size // 2,
    )
    stream = micro_batches(dataset, plan, workers=2, prefetch=1, pin_memory=False, prefetcher=prefetcher)
    ids = np.concatenate([batch["id"].numpy() for batch in stream])
    assert (ids == order.ids(np.arange(96))).all()
    assert sum(server.gets.values()) <= 24  # two epochs
    assert cached_bytes(tmp_path) <= 5 * size


def test_a_node_needs_room_for_all_of_its_lanes(
    server: FaultyServer, many_shards: Path, tmp_path: Path, config_path: Path
) -> None:
    """Of 12 shards two for each lane."""
    size = max(shard.bytes for shard in ShardedDataset(many_shards).shards)
    settings = [f"data.path={server.url}", f"data.cache_dir={tmp_path / 'cache'}", f"data.cache_size={3 * size}"]
    config = load_config(config_path, *settings, "data.order=lanes", "data.lanes=4", "data.window=1")
    open_training_data(config, index_folder=None, nodes=4)
    for nodes in (1, 2, 3):
        with pytest.raises(ConfigError, match=r"data\.cache_size = \d+: the order 'lanes' keeps coming back"):
            open_training_data(config, index_folder=None, nodes=nodes)
