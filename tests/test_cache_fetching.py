"""Shards from a server: fetched once by one process of a node, verified, and honest about faults."""

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cache_harness import IMPATIENT, cached
from tests.harness import REPOSITORY, environment
from tests.server import FaultyServer, serving
from trainer.data.cache.download import remote_size
from trainer.data.cache.node_cache import NodeCache
from trainer.data.datasets.dataset import Shard
from trainer.data.datasets.shards import ShardedDataset
from trainer.errors import DataError


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
        ("trickle", "cannot be fetched, 3 attempts: TimeoutError: .* bytes in 1.5 seconds", 3),
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


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on_where_it_ended(
    server: FaultyServer, many_shards: Path, tmp_path: Path, ranges: bool
) -> None:
    """A half and the rest; a server that knows no ranges sends it all again."""
    name = "shard-000001.tar"
    server.ranges = ranges
    server.faults[name] = ["late cut"]
    dataset = cached(server, many_shards, tmp_path)
    assert dataset.read(5) == ShardedDataset(many_shards).read(5)
    size = dataset.shards[1].bytes
    assert server.sent[name] == (size if ranges else size // 2 + size)


def test_parts_that_do_not_belong_together_are_fetched_anew(
    server: FaultyServer, many_shards: Path, tmp_path: Path
) -> None:
    """Its first byte was wrong, which the sha256 of the whole tells only in the end."""
    server.faults["shard-000001.tar"] = ["poisoned cut"]
    assert cached(server, many_shards, tmp_path).read(5) == ShardedDataset(many_shards).read(5)
    assert server.gets["shard-000001.tar"] == 3  # the rest, and all of it


def test_a_range_that_a_server_refuses_is_not_asked_for_again(
    server: FaultyServer, many_shards: Path, tmp_path: Path
) -> None:
    server.faults["shard-000001.tar"] = ["late cut", 416]
    assert cached(server, many_shards, tmp_path).read(5) == ShardedDataset(many_shards).read(5)
    assert server.gets["shard-000001.tar"] == 3


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
        patch.setattr("trainer.data.datasets.shards.checked_index", lambda *_: None)
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
from tests.cache_harness import *
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
