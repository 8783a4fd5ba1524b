"""A disk that is full or fails while the cache fetches: one line, and nothing half-made is trusted or left."""

import errno
import io
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.format import sha256_of
from tests.cache_harness import IMPATIENT, pinned, wait_until
from tests.harness import load_config
from tests.server import FaultyServer
from trainer.data.cache.download import fetch
from trainer.data.cache.node_cache import NodeCache
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.orders.order import GlobalOrder
from trainer.data.stream.prefetch import Prefetcher
from trainer.data.stream.stream import BatchLayout, MicroBatchPlan, micro_batches
from trainer.data.training_data import open_training_data
from trainer.errors import DataError

FAULTS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO]


def through(folder: Path, origin: FaultyServer, cache: Path) -> ShardedDataset:
    return ShardedDataset(folder, origin=origin.url, files=NodeCache(cache, 10**9, IMPATIENT))


def assert_only_whole_shards(cache: Path) -> int:
    """Returns how many there are."""
    kept = list((cache / "shards").iterdir())
    assert all(sha256_of(path) == path.name for path in kept)
    return len(kept)


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize("point", ["posix_fallocate", "write", "fsync", "rename"])
def test_a_disk_that_fails_while_a_shard_is_fetched_is_one_line(
    server: FaultyServer,
    many_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    number: int,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    dataset = through(many_shards, server, tmp_path / "cache")
    with monkeypatch.context() as patch:
        if point == "rename":
            patch.setattr(Path, "rename", fail)
        elif point == "write":
            patch.setattr(
                "trainer.data.cache.node_cache.fetch",
                lambda url, _, **options: fetch(url, Unwritable(number), **options),
            )
        else:
            patch.setattr(f"trainer.data.cache.node_cache.os.{point}", fail)
        with pytest.raises(DataError) as caught:
            dataset.read(5)
    assert str(caught.value) == f"data.cache_dir = {tmp_path / 'cache'}: cannot be written ({os.strerror(number)})"
    assert server.gets["shard-000001.tar"] <= 1  # the server is not to blame, so it is not asked again
    assert assert_only_whole_shards(tmp_path / "cache") == 0
    assert dataset.read(5) == ShardedDataset(many_shards).read(5)


class Unwritable(io.BytesIO):
    """A file on a disk that fails."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, _: Any) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_a_full_disk_ends_the_stream_in_one_line_and_it_goes_on_when_there_is_room(
    server: FaultyServer, many_shards: Path, mounted: Callable[[str], Path]
) -> None:
    """Room for some of the 12 shards, found to be too little in a loader process."""
    place = mounted("size=100k")
    plan = MicroBatchPlan(BatchLayout.plan(8, 1, None), order=GlobalOrder(48, 1), rank=0, first_step=0, last_step=6)

    def stream() -> list[int]:
        dataset = through(many_shards, server, place / "cache")
        batches = micro_batches(dataset, plan, workers=1, prefetch=1, pin_memory=False)
        return [sample for batch in batches for sample in batch["id"].tolist()]

    with pytest.raises(DataError) as caught:
        stream()
    assert str(caught.value) == f"data.cache_dir = {place / 'cache'}: cannot be written (No space left on device)"
    kept = assert_only_whole_shards(place / "cache")
    assert 0 < kept < 12
    before = server.gets.total()
    subprocess.run(["mount", "-o", "remount,size=1m", place], check=True)
    assert sorted(stream()) == list(range(48))
    assert server.gets.total() - before == 12 - kept


def test_a_disk_that_has_become_read_only_gives_what_it_has(
    server: FaultyServer, many_shards: Path, mounted: Callable[[str], Path]
) -> None:
    place = mounted("size=1m")
    through(many_shards, server, place / "cache").read(5)
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    dataset = through(many_shards, server, place / "cache")
    assert dataset.read(5) == ShardedDataset(many_shards).read(5)
    with pytest.raises(DataError) as caught:
        dataset.read(11)
    assert str(caught.value) == f"data.cache_dir = {place / 'cache'}: cannot be written (Read-only file system)"
    assert server.gets["shard-000002.tar"] == 0


def test_fetching_ahead_outlives_a_full_disk(
    server: FaultyServer, many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = through(many_shards, server, tmp_path / "cache")
    assert isinstance(dataset.files, NodeCache)
    allocate, calls = os.posix_fallocate, []

    def full_at_second(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(*arguments)

    monkeypatch.setattr("trainer.data.cache.node_cache.os.posix_fallocate", full_at_second)
    prefetcher = Prefetcher(
        dataset.files, dataset.shards, needs=lambda step: [step], micro_steps=range(4), in_hand=0, budget=10**9
    )
    prefetcher.start()
    wait_until(lambda: pinned(prefetcher) == {0, 2, 3})
    prefetcher.close()
    wait_until(lambda: not pinned(prefetcher))


def test_a_disk_without_room_for_the_index_is_one_line(
    server: FaultyServer, config_path: Path, mounted: Callable[[str], Path]
) -> None:
    place = mounted("size=4k")
    settings = [f"data.path={server.url}", f"data.cache_dir={place / 'cache'}"]
    with pytest.raises(DataError) as caught:
        open_training_data(load_config(config_path, *settings), index_folder=None)
    assert str(caught.value) == f"data.cache_dir = {place / 'cache'}: cannot be written (No space left on device)"
    assert not list((place / "cache" / "files").rglob("index.npy"))


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir = .*file/cache: cannot be written \(Not a directory\)"):
        NodeCache(tmp_path / "file" / "cache", 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
