"""Shards from a server through a node's cache: fetched once, verified, bounded, and honest about faults."""

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness import REPOSITORY, environment, events, launch, load_config, logged, make_dataset, overrides
from tests.server import FaultyServer, serving
from trainer.data.cache import NodeCache
from trainer.data.dataset import Shard
from trainer.data.fetch import Patience, remote_size
from trainer.data.prefetch import Prefetcher
from trainer.data.shards import ShardedDataset
from trainer.data.stream import BatchLayout, MicroBatchPlan, micro_batches
from trainer.data.training_data import open_training_data
from trainer.data.windowed import WindowedOrder
from trainer.errors import ConfigError, DataError

IMPATIENT = Patience(attempts=3, first_delay=0.01, stall=3.0, least_bytes=1000)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 shards of 4 images."""
    return make_dataset(tmp_path_factory.mktemp("many"), images=48, shard_samples=4)


@pytest.fixture
def server(many_shards: Path) -> Iterator[FaultyServer]:
    with serving(many_shards) as running:
        yield running


def cached(server: FaultyServer, folder: Path, tmp_path: Path, *, limit: int = 10**9) -> ShardedDataset:
    """The served dataset, its shards through a cache."""
    return ShardedDataset(folder, origin=server.url, files=NodeCache(tmp_path / "cache", limit, IMPATIENT))


def cached_bytes(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir())


def test_each_shard_is_fetched_once_and_read_right(server: FaultyServer, many_shards: Path, tmp_path: Path) -> None:
    dataset, local = cached(server, many_shards, tmp_path), ShardedDataset(many_shards)
    for _ in range(2):
        assert all(dataset.read(n) == local.read(n) for n in range(48))
    assert server.gets == {f"shard-{n:06d}.tar": 1 for n in range(12)}
    names = {path.name for path in (tmp_path / "cache" / "shards").iterdir()}
    assert names == {record.sha256 for record in local.manifest.shards}


@pytest.mark.parametrize("fault", ["cut", "stall", "trickle", "wrong", 503, 429])
def test_what_passes_is_tried_again(server: FaultyServer, many_shards: Path, tmp_path: Path, fault: str | int) -> None:
    server.faults["shard-000001.tar"] = [fault, fault]
    dataset = cached(server, many_shards, tmp_path)
    assert dataset.read(5) == ShardedDataset(many_shards).read(5)
    assert server.gets["shard-000001.tar"] == 3


@pytest.mark.parametrize(
    ("fault", "message", "gets"),
    [
        (404, "no such file$", 1),
        (403, "403.*Forbidden", 1),
        ("cut", "cannot be fetched, 3 attempts: .*not completed|cut off", 3),
        ("stall", "cannot be fetched, 3 attempts: timed out", 3),
        ("trickle", "cannot be fetched, 3 attempts: TimeoutError: .* bytes in 3 seconds", 3),
        ("wrong", "cannot be fetched, 3 attempts: sha256 is [0-9a-f]{64}, [0-9a-f]{64} was promised", 3),
        (500, "cannot be fetched, 3 attempts: .*500", 3),
    ],
)
def test_what_stays_is_told(
    server: FaultyServer, many_shards: Path, tmp_path: Path, fault: str | int, message: str, gets: int
) -> None:
    server.always["shard-000001.tar"] = fault
    dataset = cached(server, many_shards, tmp_path)
    with pytest.raises(DataError, match=rf"^{server.url}/shard-000001\.tar: .*({message})") as caught:
        dataset.read(5)
    assert "\n" not in str(caught.value)
    assert server.gets["shard-000001.tar"] == gets
    assert not list((tmp_path / "cache" / "shards").iterdir())  # nothing half fetched is left, nor taken for whole


@pytest.mark.parametrize("poison", ["flipped", "cut", "zeroed", "empty"])
def test_a_poisoned_copy_is_fetched_anew(server: FaultyServer, many_shards: Path, tmp_path: Path, poison: str) -> None:
    cached(server, many_shards, tmp_path).read(5)
    (copy,) = (tmp_path / "cache" / "shards").iterdir()
    content = bytearray(copy.read_bytes())
    if poison == "flipped":
        offset = int(ShardedDataset(many_shards).index[5]["offset"])
        content[offset + 10] ^= 1
    elif poison == "zeroed":
        content[:] = bytes(len(content))
    else:
        del content[len(content) // 2 if poison == "cut" else 0 :]
    copy.write_bytes(content)
    assert cached(server, many_shards, tmp_path).read(5) == ShardedDataset(many_shards).read(5)
    assert server.gets["shard-000001.tar"] == 2


def test_a_sample_that_is_bad_at_its_source_is_told(many_shards: Path, tmp_path: Path) -> None:
    """The shard is as the manifest says, the index is not: fetching again would not help."""
    copy = tmp_path / "copy"
    shutil.copytree(many_shards, copy)
    index = np.load(copy / "index.npy")
    index["crc32"][5] ^= 1
    np.save(copy / "index.npy", index)
    with serving(many_shards) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.data.shards.ShardedDataset._check_index", lambda _: None)
        dataset = cached(server, copy, tmp_path)
        with pytest.raises(DataError, match=r"shard-000001\.tar: member .* \(sample 5\): damaged \(crc32 differs\)"):
            dataset.read(5)
        assert server.gets["shard-000001.tar"] == 1


def read_in_another_process(url: str, folder: Path, cache: Path) -> None:
    dataset = ShardedDataset(folder, origin=url, files=NodeCache(cache, 10**9, IMPATIENT))
    for sample in range(48):
        dataset.read(sample)


def test_one_process_of_a_node_downloads_and_the_others_wait(
    server: FaultyServer, many_shards: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (server.url, many_shards, tmp_path / "cache")
    readers = [context.Process(target=read_in_another_process, args=arguments) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0, 0, 0]
    assert server.gets == {f"shard-{n:06d}.tar": 1 for n in range(12)}


def test_a_killed_downloader_leaves_nothing_in_the_way(server: FaultyServer, many_shards: Path, tmp_path: Path) -> None:
    server.faults["shard-000001.tar"] = ["stall"]
    program = f"""
from pathlib import Path
from tests.test_cache import *
dataset = ShardedDataset(Path({str(many_shards)!r}), origin={server.url!r},
                         files=NodeCache(Path({str(tmp_path / "cache")!r}), 10**9))
dataset.read(5)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, env=environment())
    deadline = time.monotonic() + 60
    while not server.gets["shard-000001.tar"] and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert [path.suffix for path in (tmp_path / "cache" / "shards").iterdir()] == [".part"]
    dataset = cached(server, many_shards, tmp_path, limit=2 * ShardedDataset(many_shards).shards[1].bytes)
    for sample in (9, 0):
        dataset.read(sample)  # the part makes room for what is wanted
    assert dataset.read(5) == ShardedDataset(many_shards).read(5)


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
    wait_until(lambda: len(jobs[0].pinned) + len(jobs[1].pinned) == 2)
    third = cached(server, many_shards, tmp_path, limit=4 * size)
    for sample in range(32, 48):
        third.read(sample)
    greedy, other = sorted(jobs, key=lambda job: len(job.pinned), reverse=True)
    greedy.close()  # and the other one goes on
    wait_until(lambda: len(other.pinned) == 2)
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
        patch.setattr("trainer.data.cache._scan", scan_and_delete)
        assert dataset.read(5) == ShardedDataset(many_shards).read(5)
    assert server.gets["shard-000001.tar"] == 1


def fetch_in_another_process(shards: list[Shard], cache: Path, errors: Any) -> None:
    try:
        for shard in shards:
            os.close(NodeCache(cache, 10**9, IMPATIENT).open(shard))
        errors.put("")
    except Exception as error:
        errors.put(repr(error))


def test_processes_that_fetch_different_shards_do_not_disturb_one_another(tmp_path: Path) -> None:
    """While one counts what is there, the others rename theirs."""
    shards = []
    for n in range(300):
        path, content = tmp_path / f"{n}.tar", b"%08d" % n
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        shards.append(Shard(url=str(path), samples=1, bytes=8, digest=digest, verifiable=True))
    context = multiprocessing.get_context("fork")
    errors = context.Queue()
    processes = [
        context.Process(target=fetch_in_another_process, args=(shards[k::4], tmp_path / "cache", errors))
        for k in range(4)
    ]
    for process in processes:
        process.start()
    assert [errors.get(timeout=120) for _ in processes] == [""] * 4
    for process in processes:
        process.join(60)


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
    wait_until(lambda: prefetcher.pinned == {0, 2, 3})
    prefetcher.close()


def wait_until(condition: object, patience: float = 30.0) -> None:
    deadline = time.monotonic() + patience
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.01)
    assert condition()  # type: ignore[operator]


def test_the_plan_is_fetched_ahead_within_its_budget(server: FaultyServer, many_shards: Path, tmp_path: Path) -> None:
    """Shards 0, 1, 2, ... in turn, four micro-steps each; room for three pins in a cache of six."""
    size = max(shard.bytes for shard in ShardedDataset(many_shards).shards)
    dataset = cached(server, many_shards, tmp_path, limit=6 * size)
    assert isinstance(dataset.files, NodeCache)
    prefetcher = Prefetcher(
        dataset.files, dataset.shards, needs=lambda step: [step // 4], micro_steps=range(48), in_hand=0, budget=3 * size
    )
    prefetcher.start()
    wait_until(lambda: prefetcher.pinned == {0, 1, 2})
    assert sum(server.gets.values()) == 3
    prefetcher.advance(3)  # training is still in shard 0
    time.sleep(0.1)
    assert prefetcher.pinned == {0, 1, 2}
    prefetcher.advance(9)  # in shard 2
    wait_until(lambda: prefetcher.pinned == {2, 3, 4})
    prefetcher.close()
    wait_until(lambda: not prefetcher._thread.is_alive())
    assert not prefetcher.pinned


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


def test_training_from_a_url_is_training_from_the_folder(
    server: FaultyServer, many_shards: Path, tmp_path: Path, config_path: Path
) -> None:
    """Manifest and index come from there too; two processes share one cache."""
    remote = overrides(data__path=server.url, data__cache_dir=tmp_path / "cache")
    launch(2, "--config", str(config_path), *remote)
    local = overrides(data__path=many_shards, run_dir=tmp_path / "local")
    launch(2, "--config", str(config_path), *local)
    assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "local"))
    assert max(count for name, count in server.gets.items() if name.endswith(".tar")) == 1
    assert server.gets["index.npy"] == 1


def test_staging_a_folder_to_the_nodes_disk_is_the_same_cache(
    many_shards: Path, tmp_path: Path, config_path: Path
) -> None:
    config = load_config(config_path, f"data.path={many_shards}", f"data.cache_dir={tmp_path / 'cache'}")
    data = open_training_data(config, index_folder=None)
    local = ShardedDataset(many_shards)
    assert data.dataset.fingerprint == local.fingerprint
    assert all((data.dataset.image(n) == local.image(n)).all() for n in range(48))
    staged = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "shards").iterdir()}
    assert staged == {shard.digest: Path(shard.url).read_bytes() for shard in local.shards}


def test_tars_on_a_server_train_too(tmp_path: Path, config_path: Path) -> None:
    from tests.test_tars import images_of, write_tar

    folder = tmp_path / "served"
    folder.mkdir()
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", images_of(7, first=10 * shard))
    with serving(folder) as server:
        settings = overrides(data__path=f"{server.url}/{{0..2}}.tar", data__cache_dir=tmp_path / "cache")
        launch(1, "--config", str(config_path), *settings)
        launch(1, "--config", str(config_path), *settings, *overrides(train__duration="8 steps"))
        assert dict(server.gets) == {f"{n}.tar": 1 for n in range(3)}
    assert [event["event"] for event in events(tmp_path / "run")].count("finished") == 2


def test_a_file_replaced_by_one_of_its_length_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"one")
    with serving(tmp_path) as other:
        before = remote_size(f"{other.url}/a.tar", IMPATIENT)
        assert remote_size(f"{other.url}/a.tar", IMPATIENT) == before
        path.write_bytes(b"two")
        os.utime(path, (10**9, 10**9))
        after = remote_size(f"{other.url}/a.tar", IMPATIENT)
    assert before[0] == after[0] == 3
    assert before[1] != after[1]


def test_a_dataset_that_is_replaced_behind_its_url_leaves_running_jobs_alone(
    many_shards: Path, tmp_path: Path, config_path: Path
) -> None:
    served = tmp_path / "served"
    shutil.copytree(many_shards, served)
    with serving(served) as server:
        config = load_config(config_path, f"data.path={server.url}", f"data.cache_dir={tmp_path / 'cache'}")
        first = open_training_data(config, index_folder=None).dataset
        expected = ShardedDataset(many_shards).labels(range(48)).tolist()
        shutil.rmtree(served)
        make_dataset(tmp_path / "new", images=20, shard_samples=4).rename(served)
        second = open_training_data(config, index_folder=None).dataset
    assert (len(first), len(second)) == (48, 20)
    assert isinstance(first, ShardedDataset)
    again = ShardedDataset(first.folder, origin=first.where, files=first.files)
    assert again.labels(range(48)).tolist() == expected


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


def test_settings_that_cannot_work_are_refused(server: FaultyServer, tmp_path: Path, config_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path = http://.*: needs data\.cache_dir"):
        open_training_data(load_config(config_path, f"data.path={server.url}"), index_folder=None)
    remote = [f"data.path={server.url}", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(
        ConfigError, match=r"data\.cache_size = 50000: the order 'global' keeps coming back to \d+ bytes"
    ):
        open_training_data(load_config(config_path, *remote, "data.cache_size=50 kB"), index_folder=None)
    small_window = ["data.cache_size=60 kB", "data.order=windowed", "data.window=2"]
    open_training_data(load_config(config_path, *remote, *small_window), index_folder=None)
    wrong = load_config(config_path, f"data.path={server.url}/nowhere", remote[1])
    with pytest.raises(DataError, match="/nowhere: "):
        open_training_data(wrong, index_folder=None)
    with pytest.raises(DataError, match=r"s3://bucket/set.*s3fs"):
        open_training_data(load_config(config_path, "data.path=s3://bucket/set", remote[1]), index_folder=None)


def test_a_manifest_cannot_lead_out_of_the_cache(many_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(many_shards, copy)
    manifest = (copy / "manifest.json").read_text()
    digest = ShardedDataset(many_shards).shards[0].digest
    for old, new in ((digest, "../../escaped"), ("shard-000000.tar", "../shard-000000.tar")):
        (copy / "manifest.json").write_text(manifest.replace(old, new))
        with pytest.raises(DataError, match="the manifest names a shard"):
            ShardedDataset(copy)


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir = .*file/cache: cannot be written \(Not a directory\)"):
        NodeCache(tmp_path / "file" / "cache", 10**9)
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208
