"""One rank of several: streams its share in several ways, and rank 0 prints what all of them saw.

    torchrun --nproc_per_node N tests/stream_ranks.py CONFIG ORDER:START_METHOD:WORKERS[:FIRST:LAST] ...

From step FIRST (1) to LAST (7). The ranks meet over gloo, so that they really are one job.
"""

import hashlib
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from trainer.config import Config
from trainer.data.stream.bad_samples import BadSamples
from trainer.data.stream.stream import BatchLayout, MicroBatchPlan, StartMethod, micro_batches
from trainer.data.training_data import open_training_data


@dataclass(frozen=True)
class Way:
    """A way of streaming, as its text says."""

    order: str
    start_method: StartMethod
    workers: int
    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "Way":
        order, start_method, workers, *steps = text.split(":")
        first, last = (int(step) for step in steps or ("1", "7"))
        return cls(order, "spawn" if start_method == "spawn" else "fork", int(workers), first, last)

    def config(self, path: Path) -> Config:
        return Config.load(path, [f"data.order={self.order}", "data.lanes=4", "data.window=2"])


def digest(image: np.ndarray) -> str:
    """Of (C, H, W) uint8."""
    return hashlib.sha256(np.ascontiguousarray(image)).hexdigest()


def streamed(path: Path, way: Way, rank: int, world_size: int) -> list[tuple[int, int, str]]:
    """Position, id and digest of the image, of all that this rank gets."""
    config = way.config(path)
    data = open_training_data(config, index_folder=None)
    layout = BatchLayout.plan(config.train.global_batch, world_size, None)
    skips = config.data.on_bad_sample == "skip"
    stream = micro_batches(
        data.dataset,
        MicroBatchPlan(layout, order=data.order, rank=rank, first_step=way.first, last_step=way.last),
        workers=way.workers,
        prefetch=2,
        pin_memory=False,
        start_method=way.start_method,
        bad_samples=BadSamples(config.data.max_bad_samples, lambda _: None) if skips else None,
    )
    return [
        (position, sample, digest(image))
        for batch in stream
        for position, sample, image in zip(batch["position"].tolist(), batch["id"].tolist(), batch["image"].numpy())
    ]


def main() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group("gloo", rank=int(os.environ.get("RANK", "0")), world_size=world_size)
    rank = dist.get_rank()
    path, *ways = sys.argv[1:]
    for way in ways:
        gathered: list = [None] * world_size
        dist.all_gather_object(gathered, streamed(Path(path), Way.parse(way), rank, world_size))
        if rank == 0:
            print(json.dumps({"way": way, "samples": sorted(itertools.chain(*gathered))}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
