"""One rank under torchrun: streams its share in several ways, and rank 0 compares the union with the order.

    torchrun --nproc_per_node N tests/stream_ranks.py CONFIG ORDER:START_METHOD:WORKERS[:FIRST:LAST] ...

From step FIRST (1) to LAST (7). The ranks meet over gloo, so that they really are one job.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from trainer.config import Config
from trainer.data.stream import BatchLayout, MicroBatchPlan, micro_batches
from trainer.data.training_data import open_training_data

STEPS = ("1", "7")


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    path, *ways = sys.argv[1:]
    for way in ways:
        order, start_method, workers, *steps = way.split(":")
        first, last = (int(step) for step in steps or STEPS)
        config = Config.load(Path(path), [f"data.order={order}", "data.lanes=4", "data.window=2"])
        data = open_training_data(config, index_folder=None)
        layout = BatchLayout.plan(config.train.global_batch, world_size, None)
        plan = MicroBatchPlan(layout, order=data.order, rank=rank, first_step=first, last_step=last)
        stream = micro_batches(
            data.dataset,
            plan,
            workers=int(workers),
            prefetch=2,
            pin_memory=False,
            start_method="spawn" if start_method == "spawn" else "fork",
        )
        mine = [(batch["position"].tolist(), batch["id"].tolist(), batch["image"].tolist()) for batch in stream]
        gathered: list = [None] * world_size
        dist.all_gather_object(gathered, mine)
        if rank == 0:
            samples = sorted(
                (position, sample, image)
                for share in gathered
                for batch in share
                for position, sample, image in zip(*batch)
            )
            positions = np.arange(first * layout.global_batch, last * layout.global_batch)
            ids = data.order.ids(positions)
            assert [position for position, _, _ in samples] == positions.tolist()
            assert [sample for _, sample, _ in samples] == ids.tolist()
            assert all(image == data.dataset.image(sample).tolist() for _, sample, image in samples)
            print(f"same {way}", f"ids {json.dumps([sample for _, sample, _ in samples])}", sep="\n", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
