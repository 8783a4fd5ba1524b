"""The same stream of samples for any number of ranks and loader workers, from any position."""

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.harness import REPOSITORY, environment, make_dataset
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.orders.order import GlobalOrder, sample_ids
from trainer.data.stream.stream import (
    BatchLayout,
    MicroBatchPlan,
    StartMethod,
    loader_death_as_data_error,
    micro_batches,
)
from trainer.errors import ConfigError, DataError
from trainer.signals import STOP_SIGNALS

BATCH, SEED, STEPS = 8, 3, 7  # 56 positions: over two and a half epochs of 21 images, crossed inside batches


def stream_of(
    dataset: ShardedDataset,
    *,
    world_size: int,
    workers: int,
    micro_batch: int | None = None,
    first_step: int = 0,
    batch: int = BATCH,
) -> dict[str, torch.Tensor]:
    """All ranks' streams, put together as global batches: position, id and image in the order of training."""
    layout = BatchLayout.plan(batch, world_size, micro_batch)
    ranks = []
    for rank in range(world_size):
        plan = MicroBatchPlan(
            layout, order=GlobalOrder(len(dataset), SEED), rank=rank, first_step=first_step, last_step=STEPS
        )
        batches = list(micro_batches(dataset, plan, workers=workers, prefetch=2, pin_memory=False))
        assert len(batches) == layout.accumulation * (STEPS - first_step)
        share = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        ranks.append({name: value.unflatten(0, (STEPS - first_step, -1)) for name, value in share.items()})
    return {name: torch.cat([rank[name] for rank in ranks], dim=1).flatten(0, 1) for name in ranks[0]}


def open_stream(folder: Path, start_method: StartMethod = "fork") -> Generator[dict[str, torch.Tensor], None, None]:
    """One rank's stream from one loader process."""
    layout = BatchLayout.plan(BATCH, 1, None)
    plan = MicroBatchPlan(layout, order=GlobalOrder(21, SEED), rank=0, first_step=0, last_step=STEPS)
    return micro_batches(
        ShardedDataset(folder), plan, workers=1, prefetch=1, pin_memory=False, start_method=start_method
    )


@pytest.fixture(scope="module")
def opened(dataset: Path) -> ShardedDataset:
    return ShardedDataset(dataset)


@pytest.fixture(scope="module")
def reference(opened: ShardedDataset) -> dict[str, torch.Tensor]:
    return stream_of(opened, world_size=1, workers=0)


def test_the_stream_is_the_order(reference: dict[str, torch.Tensor]) -> None:
    assert reference["position"].tolist() == list(range(BATCH * STEPS))
    assert reference["id"].tolist() == sample_ids(np.arange(BATCH * STEPS), 21, SEED).tolist()
    assert reference["image"].dtype == torch.uint8
    assert reference["image"].shape == (BATCH * STEPS, 3, 8, 8)


def test_images_are_those_of_the_source(reference: dict[str, torch.Tensor], dataset: Path) -> None:
    from PIL import Image

    for sample, image in zip(reference["id"].tolist(), reference["image"], strict=True):
        with Image.open(dataset.parent / "images" / f"{sample:03d}.png") as source:
            assert (np.asarray(source) == image.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "workers"),
    [(1, None, 1), (1, 2, 0), (1, 2, 2), (1, 1, 3), (2, None, 0), (2, 1, 1), (2, 2, 2), (4, None, 1), (8, None, 0)],
)
def test_it_is_the_same_for_any_number_of_ranks_and_workers(
    opened: ShardedDataset, reference: dict[str, torch.Tensor], world_size: int, micro_batch: int | None, workers: int
) -> None:
    found = stream_of(opened, world_size=world_size, workers=workers, micro_batch=micro_batch)
    for name, value in reference.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("first_step", [1, 3, 6])
def test_it_goes_on_from_any_step(opened: ShardedDataset, reference: dict[str, torch.Tensor], first_step: int) -> None:
    """Step 3 begins at position 24, inside the second epoch."""
    found = stream_of(opened, world_size=2, workers=1, first_step=first_step)
    for name, value in reference.items():
        assert torch.equal(found[name], value[first_step * BATCH :]), name


@pytest.mark.parametrize("first_step", [2, 3, 6])
def test_it_goes_on_from_the_end_of_an_epoch(opened: ShardedDataset, first_step: int) -> None:
    """Steps 3 and 6 begin the second and the third epoch exactly."""
    whole = stream_of(opened, world_size=1, workers=0, batch=7)
    found = stream_of(opened, world_size=7, workers=0, batch=7, first_step=first_step)
    for name, value in whole.items():
        assert torch.equal(found[name], value[first_step * 7 :]), name
    epochs = torch.cat([whole["id"][: first_step * 7], found["id"]])[:42].unflatten(0, (2, 21))
    assert (epochs.sort(dim=1).values == torch.arange(21)).all()


def test_an_epoch_smaller_than_a_batch_and_fewer_shards_than_ranks(tmp_path: Path) -> None:
    dataset = ShardedDataset(make_dataset(tmp_path, images=3, shard_samples=2))
    assert len(dataset.manifest.shards) == 2
    found = stream_of(dataset, world_size=4, workers=1)
    epochs = found["id"][:54].unflatten(0, (18, 3))
    assert (epochs.sort(dim=1).values == torch.arange(3)).all()
    whole = stream_of(dataset, world_size=1, workers=0)["id"]
    assert torch.equal(found["id"], whole)
    for first_step in (3, 4):  # positions 24, where an epoch of 3 begins, and 32, inside one
        resumed = stream_of(dataset, world_size=2, workers=1, first_step=first_step)["id"]
        assert torch.equal(resumed, whole[first_step * BATCH :])


def damaged_copy(dataset: Path, tmp_path: Path) -> tuple[Path, ShardedDataset]:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    return copy, ShardedDataset(copy)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["flipped bit", "zeroed block", "cut off"])
def test_a_damaged_sample_is_named_in_one_line(dataset: Path, tmp_path: Path, damage: str, workers: int) -> None:
    copy, opened = damaged_copy(dataset, tmp_path)
    shard = copy / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    offset = int(opened.index[13]["offset"])  # sample 13 is the fourth of the second shard
    if damage == "flipped bit":
        content[offset + 20] ^= 4
    elif damage == "zeroed block":
        content[offset - 512 : offset + 512] = bytes(1024)
    else:
        del content[offset + 10 :]
    shard.write_bytes(content)
    with pytest.raises(DataError) as caught:
        stream_of(opened, world_size=1, workers=workers)
    assert "shard-000001.tar: member 0000" in str(caught.value)
    assert "damaged (crc32 differs)" in str(caught.value)  # found before a decoder could guess at the rest
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damaged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stream_left_open_does_not_hold_up_the_exit(dataset: Path, tmp_path: Path, damaged: bool) -> None:
    copy, _ = damaged_copy(dataset, tmp_path)
    program = f"""
import sys
from pathlib import Path
from tests.test_stream import open_stream
stream = open_stream(Path({str(copy)!r}))
if {damaged}:
    for shard in {[str(path) for path in copy.glob("*.tar")]!r}:
        open(shard, "r+b").write(bytes(4096))
    try:
        list(stream)
    except Exception as error:
        sys.kept = error
else:
    sys.kept = [stream, next(stream)]
    sys.kept.append(sys.kept)  # no end of the iterator before the interpreter's
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=REPOSITORY, env=environment())


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_loaders_heed_their_trainer_and_nobody_else(opened: ShardedDataset, start_method: StartMethod) -> None:
    stream = open_stream(opened.folder, start_method)
    next(stream)
    (loader,) = multiprocessing.active_children()
    for number in STOP_SIGNALS:
        subprocess.run(["kill", f"-{number:d}", str(loader.pid)], check=True)
    time.sleep(0.2)
    assert loader.is_alive()
    loader.terminate()
    loader.join(20)
    assert not loader.is_alive()
    stream.close()


def test_a_loader_that_was_killed_is_told_in_one_line(opened: ShardedDataset) -> None:
    stream = open_stream(opened.folder)
    next(stream)
    (loader,) = multiprocessing.active_children()
    message = r"^DataLoader worker \(pid.*/dev/shm; take fewer data\.workers or a smaller data\.prefetch$"

    def go_on() -> None:
        with loader_death_as_data_error():  # torch may speak up in the join, too
            loader.kill()
            loader.join(20)
            list(stream)

    with pytest.raises(DataError, match=message) as caught:
        go_on()
    assert "\n" not in str(caught.value)
    stream.close()


def test_other_errors_are_not_taken_for_dead_loaders() -> None:
    with pytest.raises(RuntimeError, match=r"^Caught RuntimeError in DataLoader worker"), loader_death_as_data_error():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")


@pytest.mark.slow
def test_spawned_loaders_ignore_stop_signals_from_the_start(opened: ShardedDataset) -> None:
    """They import for seconds before any of our code runs, so the mask must come from the trainer.

    In a process of its own: the tracker that would lift the mask starts once.
    """
    program = f"""
import multiprocessing
from pathlib import Path
from tests.test_stream import open_stream
stream = open_stream(Path({str(opened.folder)!r}), "spawn")
next(stream)
(loader,) = multiprocessing.active_children()
print(Path(f"/proc/{{loader.pid}}/status").read_text())
stream.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=120,
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
    )
    (blocked,) = [int(line.split()[1], 16) for line in done.stdout.decode().splitlines() if line.startswith("SigBlk")]
    assert all(blocked & 1 << number - 1 for number in STOP_SIGNALS)


def test_changed_folders_are_refused_when_opened(dataset: Path, tmp_path: Path) -> None:
    copy, _ = damaged_copy(dataset, tmp_path)
    shard = copy / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(DataError, match=r"shard-000001\.tar: \d+ bytes, the manifest says"):
        ShardedDataset(copy)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: missing"):
        ShardedDataset(copy)
    shard.write_bytes(content)
    (copy / "shard-000003.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"shard-000003\.tar: not in the manifest"):
        ShardedDataset(copy)
    (copy / "shard-000003.tar").unlink()
    index = np.load(copy / "index.npy")
    index["offset"][0] += 512
    np.save(copy / "index.npy", index)
    with pytest.raises(DataError, match=r"index\.npy: sha256 differs"):
        ShardedDataset(copy)
    np.save(copy / "index.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["index_sha256"] = hashlib.sha256((copy / "index.npy").read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"index\.npy: cannot be read as an index"):  # nor is a pickle loaded from it
        ShardedDataset(copy)


def test_open_files_stay_bounded(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.datasets.indexed._OPEN_SHARDS", 2)
    opened = ShardedDataset(dataset)
    for _ in range(3):
        for sample in range(len(opened)):
            opened.read(sample)
            assert len(opened._descriptors) <= 2
    opened.close()
    assert not opened._descriptors


@pytest.mark.parametrize("workers", [0, 1])
def test_swapped_shards_are_noticed(dataset: Path, tmp_path: Path, workers: int) -> None:
    """Two shards of the same size under each other's names: every sample of them is another than the index says."""
    copy, _ = damaged_copy(dataset, tmp_path)
    one, other = copy / "shard-000000.tar", copy / "shard-000001.tar"
    assert one.stat().st_size == other.stat().st_size
    one.rename(copy / "aside")
    other.rename(one)
    (copy / "aside").rename(other)
    with pytest.raises(DataError, match=r"shard-00000[01]\.tar: .*crc32 differs"):
        stream_of(ShardedDataset(copy), world_size=1, workers=workers)


def test_descriptors_and_memory_stay_flat_over_50_epochs(opened: ShardedDataset) -> None:
    """In the trainer and in its loader: after five epochs nothing grows any more."""
    layout = BatchLayout.plan(21, 1, None)
    plan = MicroBatchPlan(layout, order=GlobalOrder(21, SEED), rank=0, first_step=0, last_step=50)
    stream = micro_batches(opened, plan, workers=1, prefetch=1, pin_memory=False)
    seen = []
    for _ in stream:
        (loader,) = multiprocessing.active_children()
        processes = [psutil.Process(), psutil.Process(loader.pid)] if loader.is_alive() else []
        seen.append([(process.num_fds(), process.memory_info().rss) for process in processes])
        if len(seen) == 48:  # the loader ends with its last batch
            break
    stream.close()
    assert len(seen) == 48
    assert len(seen[5]) == len(seen[-1]) == 2
    for early, late in zip(seen[5], seen[-1]):
        assert late[0] <= early[0] + 8  # batches on their way have some; one kept an epoch would make 42
        assert late[1] < early[1] + (8 << 20)


def test_batches_that_do_not_divide_name_what_would() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch = 8: .* by 3 processes; .*: 1, 2, 4, 8$"):
        BatchLayout.plan(8, 3, None)
    with pytest.raises(ConfigError, match=r"train\.micro_batch = 3: does not divide the 4 images .* valid: 1, 2, 4$"):
        BatchLayout.plan(8, 2, 3)
    assert BatchLayout.plan(8, 4, 16).micro_batch == 2  # a device that could hold more gets its share
