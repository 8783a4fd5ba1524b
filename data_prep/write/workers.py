"""Distributes shards over worker processes: a bounded number in flight, and no worker outlives the run."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from data_prep.errors import DataPrepError
from data_prep.recipe import Recipe
from data_prep.write.memory import keep_freed_memory
from data_prep.write.writer import ShardPlan, write_shard

IN_FLIGHT_PER_WORKER = 2  # one being written and one queued, so that no worker is idle


def write_shards(plans: Sequence[ShardPlan], recipe: Recipe, out: Path, staging: Path, workers: int) -> Iterator[int]:
    """Write all `plans` in any order; yields the number of sources of each as it is completed.

    Raises DataPrepError where a shard cannot be written or a worker dies; the other workers are stopped then.
    """
    with ProcessPoolExecutor(
        max_workers=min(workers, len(plans)),
        mp_context=multiprocessing.get_context("spawn"),  # fork would copy locks held by the parent's threads
        initializer=_begin_worker,
    ) as pool:
        waiting = iter(plans)

        def submit(count: int) -> set[Future[int]]:
            with _ctrl_c_left_to_parent():
                return {pool.submit(write_shard, plan, recipe, out, staging) for plan in islice(waiting, count)}

        try:
            running = submit(workers * IN_FLIGHT_PER_WORKER)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for shard in done:
                    yield shard.result()
                running |= submit(len(done))
        except BaseException as error:
            for child in multiprocessing.active_children():  # otherwise the pool would wait for their current shards
                child.terminate()
            if isinstance(error, BrokenProcessPool | MemoryError):
                raise DataPrepError(
                    f"{out}: a worker process died, most likely for want of memory; "
                    "run again to go on from here, with fewer --workers"
                ) from error
            raise


@contextmanager
def _ctrl_c_left_to_parent() -> Iterator[None]:
    """A context that blocks SIGINT: processes started in it inherit the block; this process receives it at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """Make the worker exit with its parent, and set its memory allocator for images."""
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
