"""The stream of micro-batches: every rank's share of every global batch, in order, resumable from one integer."""

import functools
import gc
import itertools
import os
import re
import signal
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Literal

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from trainer.data.datasets.dataset import Dataset
from trainer.data.orders.order import Int64Array, Order
from trainer.data.stream.bad_samples import BadSamples
from trainer.data.stream.batch_memory import BatchMemory
from trainer.data.stream.batches import ReadSamples, as_tensors, batched, pixels_shape
from trainer.data.stream.prefetch import Prefetcher
from trainer.errors import ConfigError, DataError
from trainer.signals import STOP_SIGNALS, on_parents_death

StartMethod = Literal["fork", "spawn"]

_PLANNED_AT_ONCE = 32  # micro-batches: computing an order has a cost per call
_IN_TRAINING = 2  # batches that the trainer holds at a time: the current one and the next
_DEAD_LOADER = re.compile(r"DataLoader worker \(pid.*?\) .*")  # torch's message
_ERROR_NAME = re.compile(r"^trainer\.errors\.\w+: ")


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """Division of a global batch: global_batch = world_size x accumulation x micro_batch."""

    global_batch: int
    world_size: int
    micro_batch: int

    @classmethod
    def plan(cls, global_batch: int, world_size: int, largest_micro_batch: int | None) -> "BatchLayout":
        """Divide the global batch over ranks, a rank's share into micro-batches of at most `largest_micro_batch`.

        Raises ConfigError with the valid values where it does not divide.
        """
        if global_batch % world_size:
            raise ConfigError(
                f"train.global_batch = {global_batch}: is not divisible by {world_size} processes; "
                f"valid numbers of processes: {_shorten(divisors(global_batch))}"
            )
        share = global_batch // world_size
        micro_batch = min(share, largest_micro_batch or share)
        if share % micro_batch:
            raise ConfigError(
                f"train.micro_batch = {micro_batch}: does not divide the {share} images of a process "
                f"({global_batch} / {world_size} processes); valid: {_shorten(divisors(share))}"
            )
        return cls(global_batch=global_batch, world_size=world_size, micro_batch=micro_batch)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank per optimizer step."""
        return self.global_batch // (self.world_size * self.micro_batch)

    def positions(self, rank: int, micro_step: int) -> np.ndarray:
        """Positions of one micro-batch, (micro_batch,) int64; micro_step counts from the start of the run.

        Ranks take contiguous parts of the global batch, so the union over ranks does not depend on their number.
        """
        step, accumulated = divmod(micro_step, self.accumulation)
        share = self.global_batch // self.world_size
        first = step * self.global_batch + rank * share + accumulated * self.micro_batch
        return np.arange(first, first + self.micro_batch, dtype=np.int64)


def divisors(n: int) -> list[int]:
    """All divisors of n >= 1, ascending."""
    return [divisor for divisor in range(1, n + 1) if n % divisor == 0]


class MicroBatchPlan:
    """The source of the pipeline: this loader worker's positions and ids, one micro-batch at a time.

    Worker w of W takes micro-batches first + w, first + w + W, ...: the DataLoader reads from its workers in turn,
    which restores the order.
    """

    def __init__(self, layout: BatchLayout, *, order: Order, rank: int, first_step: int, last_step: int) -> None:
        self.layout = layout
        self.order = order
        self.rank = rank
        self.micro_steps = range(first_step * layout.accumulation, last_step * layout.accumulation)

    def __call__(self) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Yield positions and ids, each (micro_batch,) int64, of each micro-batch."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = self.micro_steps[first::stride]
        for begin in range(0, len(mine), _PLANNED_AT_ONCE):
            steps = mine[begin : begin + _PLANNED_AT_ONCE]
            positions = np.stack([self.layout.positions(self.rank, micro_step) for micro_step in steps])
            yield from zip(positions, self.order.ids(positions.ravel()).reshape(positions.shape))

    def shards(self, dataset: Dataset, micro_step: int) -> list[int]:
        """Shards that a micro-step reads, in the order of need."""
        found = dataset.shards_of(self.order.ids(self.layout.positions(self.rank, micro_step)))
        return list(dict.fromkeys(found.tolist()))


def micro_batches(
    dataset: Dataset,
    plan: MicroBatchPlan,
    *,
    workers: int,
    prefetch: int,
    pin_memory: bool,
    start_method: StartMethod = "fork",
    bad_samples: BadSamples | None = None,
    prefetcher: Prefetcher | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Iterate over the plan's micro-batches in order, see `as_tensors`, without "faults".

    Raises DataError, with a one-line message, where a sample is damaged; with `bad_samples` it is replaced and counted
    there. Also where a loader process was killed; see `loader_death_as_data_error`.
    """
    if len(plan.micro_steps) == 0:
        return
    loader = _loader(dataset, plan, workers, prefetch, pin_memory, start_method, replaces=bad_samples is not None)
    batches = enumerate(iter(loader), start=plan.micro_steps.start)
    try:
        with loader_death_as_data_error():
            with _stop_signals_blocked():
                first = next(batches)  # starts the loader processes, which inherit the signal mask
            if prefetcher is not None:
                prefetcher.start()
            for micro_step, packed in itertools.chain([first], batches):
                batch = as_tensors(packed)
                faults = batch.pop("faults")
                if bad_samples is not None:
                    bad_samples.note(faults)
                if prefetcher is not None:
                    prefetcher.advance(micro_step)
                yield batch
    except DataError as error:
        _release_loaders(error)
        # A loader process puts its traceback into the message; the last line is the original message.
        raise DataError(_ERROR_NAME.sub("", str(error).strip().splitlines()[-1])) from error
    finally:
        if prefetcher is not None:
            prefetcher.close()


def _loader(
    dataset: Dataset,
    plan: MicroBatchPlan,
    workers: int,
    prefetch: int,
    pin_memory: bool,
    start_method: StartMethod,
    *,
    replaces: bool,
) -> Iterable[dict[str, Any]]:
    """The pipeline in its loader processes; `replaces`: damaged samples by others of the order."""
    loaders = min(workers, len(plan.micro_steps))
    # A loader prepares as many batches as it may prefetch, while the trainer holds one and requests the next.
    memory = BatchMemory(
        pixels_shape(dataset, plan.layout.micro_batch),
        loaders=loaders,
        slots=_IN_TRAINING + (prefetch if loaders else 0),
    )
    samples = ReadSamples(dataset, replace_by=plan.order if replaces else None, memory=memory)
    loader: Iterable[dict[str, Any]] = wds.WebLoader(
        wds.DataPipeline(plan, samples, functools.partial(batched, size=plan.layout.micro_batch)),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=loaders,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(_prepare_worker, os.getpid()),
        multiprocessing_context=start_method if workers else None,
    )
    return loader


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """Replaces torch's collation, which would copy each small array to its own shared memory."""
    return batch


@contextmanager
def loader_death_as_data_error() -> Iterator[None]:
    """A context that turns torch's error for a killed loader process into DataError.

    torch raises it in a signal handler, at any point of the main thread: so all code that runs while a stream is open
    needs this context, not only the stream.
    """
    try:
        yield
    except RuntimeError as error:
        found = _DEAD_LOADER.match(str(error))
        if found is None:
            raise
        _release_loaders(error)
        raise DataError(
            f"{found[0].rstrip('. ')}: a loader process ended, most often for want of memory or of room in /dev/shm; "
            "take fewer data.workers or a smaller data.prefetch"
        ) from error


def _release_loaders(error: BaseException) -> None:
    # The error and its traceback's frames reference each other, and through them the loader: without this its processes
    # would stay alive until a garbage collection, which destroys them in arbitrary order.
    traceback.clear_frames(error.__traceback__)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """A context that blocks stop signals: launchers signal process groups, but only the trainer stops its loaders."""
    # Starting the resource tracker of spawned processes resets this mask, so it is started before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(trainer: int, _: int) -> None:
    # A forked loader inherits the trainer's sockets: while it lives, other ranks do not notice a dead trainer.
    on_parents_death(signal.SIGKILL)
    if os.getppid() != trainer:
        os._exit(0)
    gc.enable()  # disabled in the trainer, from which it was forked
    torch.set_num_threads(1)  # parallelism is by worker processes
    threading.Thread(target=_exit_on_trainers_sigterm, args=(trainer,), daemon=True).start()


def _exit_on_trainers_sigterm(trainer: int) -> None:
    """Accept SIGTERM, which is blocked, from the trainer: it would hang if its loader ignored that."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _shorten(values: list[int]) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:11], "...", texts[-1]])
