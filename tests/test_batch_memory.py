"""The memory of batches is used again, and never while anybody still looks at it."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from tests.data_harness import image_of
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.orders.order import GlobalOrder
from trainer.data.stream import batch_memory
from trainer.data.stream.batch_memory import BatchMemory, Slot
from trainer.data.stream.stream import BatchLayout, MicroBatchPlan, StartMethod, micro_batches
from trainer.errors import DataError

STEPS, PREFETCH = 30, 2
LOADERS: list[tuple[int, StartMethod]] = [(0, "fork"), (1, "fork"), (2, "fork"), (1, "spawn")]


def stream(
    dataset: ShardedDataset, workers: int, start_method: StartMethod
) -> Generator[dict[str, torch.Tensor], None, None]:
    plan = MicroBatchPlan(BatchLayout.plan(8, 1, None), order=GlobalOrder(21, 3), rank=0, first_step=0, last_step=STEPS)
    return micro_batches(dataset, plan, workers=workers, prefetch=PREFETCH, pin_memory=False, start_method=start_method)


@pytest.mark.parametrize(("workers", "start_method"), LOADERS)
def test_what_is_kept_stays_as_it_was(dataset: Path, workers: int, start_method: StartMethod) -> None:
    """Every third batch is kept whole, of every fifth one image: more than there are slots."""
    opened = ShardedDataset(dataset)
    kept: list[tuple[torch.Tensor, list[int]]] = []
    for number, batch in enumerate(stream(opened, workers, start_method)):
        if number % 3 == 0:
            kept.append((batch["image"], batch["id"].tolist()))
        elif number % 5 == 0:
            kept.append((batch["image"][5:6], batch["id"][5:6].tolist()))
    assert len(kept) == 14
    for images, ids in kept:
        assert all((image.numpy() == image_of(opened, sample)).all() for image, sample in zip(images, ids, strict=True))


@pytest.mark.parametrize(("workers", "start_method"), LOADERS)
def test_a_trainer_that_lets_go_is_served_from_the_same_memory(
    dataset: Path, workers: int, start_method: StartMethod
) -> None:
    places = [batch["image"].data_ptr() for batch in stream(ShardedDataset(dataset), workers, start_method)]
    assert len(places) == STEPS
    slots = 2 + PREFETCH if workers else 2
    assert len(set(places)) <= max(1, workers) * slots


@pytest.fixture
def memory() -> BatchMemory:
    return BatchMemory((2, 3), loaders=0, slots=2)


def filled(memory: BatchMemory, value: int) -> Slot:
    taken = memory.take()
    assert taken is not None
    slot, pixels = taken
    pixels[:] = value
    return slot


def test_a_slot_is_free_when_its_last_view_is_gone(memory: BatchMemory) -> None:
    whole = filled(memory, 1).tensor()
    part = whole.permute(1, 0)[2:]
    other = filled(memory, 2).tensor()
    del whole
    assert memory.take() is None
    assert part.tolist() == [[1, 1]]
    assert other.tolist() == [[2, 2, 2]] * 2
    array = part.numpy()
    del part
    assert memory.take() is None
    del array
    assert filled(memory, 3).tensor().tolist() == [[3, 3, 3]] * 2


def test_a_shared_memory_that_is_full_is_one_line(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    message = r"^/dev/shm: no room for the 6144 bytes that 1 loader processes share .*data\.workers .*data\.prefetch$"
    with pytest.raises(DataError, match=message):
        next(stream(ShardedDataset(dataset), 1, "fork"))


def test_memory_that_cannot_be_had_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch makes a file, finds that it cannot fill it, and leaves it."""
    mine, others = tmp_path / f"torch_{os.getpid()}_1_0", tmp_path / f"torch_{os.getpid() + 1}_1_0"

    def full(*_: object, **__: object) -> None:
        mine.touch()
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    monkeypatch.setattr(batch_memory, "_SHARED", tmp_path)
    others.touch()
    with pytest.raises(DataError, match="no room for the 1 bytes"):
        BatchMemory((1,), loaders=1, slots=1)
    assert list(tmp_path.iterdir()) == [others]


def test_more_memory_than_there_is_is_not_even_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", never)
    with pytest.raises(DataError, match=f"/dev/shm: no room for the {10**15} bytes"):
        BatchMemory((10**9,), loaders=1, slots=10**6)


def test_a_pinned_batch_is_a_copy_and_its_slot_is_free(memory: BatchMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """To pin takes a GPU; here a copy stands for it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    copies = [filled(memory, value).pin_memory() for value in range(5)]
    assert [copy[0, 0].item() for copy in copies] == list(range(5))


def test_a_pinning_stream_takes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words that torch's pinning thread and its loader without processes have for a batch."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    memory = BatchMemory((1,), loaders=0, slots=1)
    for value in range(3):
        pinned = pin_memory({"image": filled(memory, value), "faults": []})
        assert isinstance(pinned["image"], torch.Tensor)
        assert pinned["image"].tolist() == [value]
