"""What the tests of the cache share."""

import time
from collections.abc import Callable
from pathlib import Path

from tests.server import FaultyServer
from trainer.data.cache.download import Patience
from trainer.data.cache.node_cache import NodeCache
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.stream.prefetch import Prefetcher

IMPATIENT = Patience(attempts=3, first_delay=0.01, stall=1.5, least_bytes=1000)


def cached(server: FaultyServer, folder: Path, tmp_path: Path, *, limit: int = 10**9) -> ShardedDataset:
    """The served dataset, its shards through a cache."""
    return ShardedDataset(folder, origin=server.url, files=NodeCache(tmp_path / "cache", limit, IMPATIENT))


def cached_bytes(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir())


def pinned(prefetcher: Prefetcher) -> set[int]:
    """The shards that it keeps from being evicted now."""
    return set(prefetcher._pins)


def wait_until(condition: Callable[[], bool], patience: float = 30.0) -> None:
    deadline = time.monotonic() + patience
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()
