"""The stream of micro-batches: every rank's share of every global batch, in order, resumed from one integer."""

import os
import signal
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from trainer.data.decode import decode
from trainer.data.order import sample_ids
from trainer.data.shards import ShardedDataset
from trainer.errors import ConfigError, DataError
from trainer.signals import STOP_SIGNALS


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How a global batch is divided: global_batch = world_size x accumulation x micro_batch."""

    global_batch: int
    world_size: int
    micro_batch: int

    @classmethod
    def plan(cls, global_batch: int, world_size: int, largest_micro_batch: int | None) -> "BatchLayout":
        """Divide the global batch over the ranks, and a rank's share into micro-batches that fit.

        Raises ConfigError with the valid values where it does not divide.
        """
        if global_batch % world_size:
            valid = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
            raise ConfigError(
                f"train.global_batch = {global_batch}: is not divisible by {world_size} processes; "
                f"valid numbers of processes: {_shorten(valid)}"
            )
        share = global_batch // world_size
        micro_batch = min(share, largest_micro_batch or share)
        if share % micro_batch:
            valid = [n for n in range(1, share + 1) if share % n == 0]
            raise ConfigError(
                f"train.micro_batch = {micro_batch}: does not divide the {share} images of a process "
                f"({global_batch} / {world_size} processes); valid: {_shorten(valid)}"
            )
        return cls(global_batch=global_batch, world_size=world_size, micro_batch=micro_batch)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.global_batch // (self.world_size * self.micro_batch)

    def positions(self, rank: int, micro_step: int) -> np.ndarray:
        """Positions of one micro-batch, (micro_batch,) int64; micro_step counts from the run's beginning.

        Ranks take contiguous parts of the global batch, so that the union over ranks does not depend on their number.
        """
        step, accumulated = divmod(micro_step, self.accumulation)
        share = self.global_batch // self.world_size
        first = step * self.global_batch + rank * share + accumulated * self.micro_batch
        return np.arange(first, first + self.micro_batch, dtype=np.int64)


class MicroBatchPlan:
    """The pipeline's source: this loader worker's (position, id) pairs, whole micro-batches at a time.

    Worker w of W takes micro-batches first + w, first + w + W, ...: the DataLoader asks its workers in turn, which
    puts them back in order.
    """

    def __init__(
        self, layout: BatchLayout, *, samples: int, seed: int, rank: int, first_step: int, last_step: int
    ) -> None:
        self.layout = layout
        self.samples = samples
        self.seed = seed
        self.rank = rank
        self.micro_steps = range(first_step * layout.accumulation, last_step * layout.accumulation)

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Yield {"position": int, "id": int} for each sample."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for micro_step in self.micro_steps[first::stride]:
            positions = self.layout.positions(self.rank, micro_step)
            ids = sample_ids(positions, self.samples, self.seed)
            for position, sample in zip(positions.tolist(), ids.tolist(), strict=True):
                yield {"position": position, "id": sample}


class ReadAndDecode:
    """The pipeline's map: adds "image", (C, H, W) uint8, and "label" to a sample."""

    def __init__(self, dataset: ShardedDataset) -> None:
        self.dataset = dataset

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Read, check and decode; raises DataError that names shard and member."""
        manifest = self.dataset.manifest
        encoded = self.dataset.read(sample["id"])
        try:
            image = decode(encoded, manifest.image_size, manifest.mode)
        except DataError as error:
            raise DataError(f"{self.dataset.describe(sample['id'])}: {error}") from error
        return {**sample, "image": image, "label": self.dataset.label(sample["id"])}


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack samples: image (B, C, H, W) uint8; position, id, label (B,) int64."""
    batch = {name: torch.tensor([sample[name] for sample in samples]) for name in ("position", "id", "label")}
    return {**batch, "image": torch.from_numpy(np.stack([sample["image"] for sample in samples]))}


def micro_batches(
    dataset: ShardedDataset, plan: MicroBatchPlan, *, workers: int, prefetch: int, pin_memory: bool
) -> Generator[dict[str, torch.Tensor], None, None]:
    """Stream the plan's micro-batches, as `collate` makes them, in order.

    Raises DataError, in one line, where a sample is damaged.
    """
    if len(plan.micro_steps) == 0:
        return
    pipeline = wds.DataPipeline(
        plan,
        wds.map(ReadAndDecode(dataset)),
        wds.batched(plan.layout.micro_batch, collation_fn=collate, partial=False),
    )
    loader: Iterable[dict[str, torch.Tensor]] = wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=min(workers, len(plan.micro_steps)),
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
    )
    batches = iter(loader)
    try:
        with _stop_signals_blocked():
            first = next(batches)  # starts the loader processes, which inherit the mask
        yield first
        yield from batches
    except DataError as error:
        # The error and the frames of its traceback hold each other, and among them the loader: without this its
        # processes would live until a garbage collection, which takes them apart in no order.
        traceback.clear_frames(error.__traceback__)
        # A loader process wraps the message in its traceback; the last line is the one that was raised.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("trainer.errors.DataError: ")) from error


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Launchers and schedulers signal whole process groups: to stop is the trainer's to decide, not its loaders'."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)  # one process a worker is the parallelism that was asked for
    threading.Thread(target=_end_when_the_trainer_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_trainer_says(trainer: int) -> None:
    """Deaf to everyone else's SIGTERM, a loader must heed its trainer's: whoever waits for it would wait for ever."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _shorten(values: list[int]) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:11], "...", texts[-1]])
