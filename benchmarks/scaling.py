"""Data parallelism over ranks on this machine, and a model of more nodes from what was measured.

    python benchmarks/scaling.py                                     # 1, 2, 4 ranks; a size that fits the device
    python benchmarks/scaling.py --step-seconds 0.45 --parameters 113.7e6 --ranks-per-node 8 \\
        --node-bandwidth 400 --link-bandwidth 50                     # the model for a step measured elsewhere

Every rank trains on `--batch` images (weak scaling). On a CPU a rank has `--threads` threads, pinned to cores of its
own as long as there are enough; ranks beyond them share cores, and efficiency is against the cores that there are, so
that it is of the trainer and not of missing hardware. Each group of ranks waits in processes of its own and takes
turns.

Measured of each group: steps with gradients averaged; steps with them kept local; the same bytes all-reduced with
nothing else to do. What the first takes longer than the second is exposed communication; the rest of the third is
hidden behind the backward pass. Bytes are those that DistributedDataParallel hands to the network, counted where it
does so.

The model is `modelled_step` of scaling_model.py.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks import ours
from benchmarks.machine import cores, default_device, describe, synchronize
from benchmarks.scaling_model import Links, modelled
from trainer.config import Config
from trainer.engine.strategies import data_parallel


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every rank does in a turn."""

    config: Path
    overrides: tuple[str, ...]
    batch: int
    steps: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of the slowest rank, in one turn: of a step, of one whose gradients stay local, of their bare all-reduce."""

    step: float
    local: float
    all_reduce: float


def serve(rank: int, ranks: int, port: int, setting: Setting, pipe: Connection) -> None:
    """One rank: a turn for every "turn" on the pipe, the bytes a step for "bytes"."""
    if not torch.cuda.is_available():
        available = sorted(os.sched_getaffinity(0))
        pinned = itertools.islice(itertools.cycle(available), rank * setting.threads, (rank + 1) * setting.threads)
        os.sched_setaffinity(0, list(pinned))
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["OMP_NUM_THREADS"] = str(setting.threads)  # unset, Accelerate would choose, with a warning
    overrides = [*setting.overrides, f"train.global_batch={ranks * setting.batch}"]
    config = Config.load(setting.config, overrides)
    step = ours.make_train_step(config, ranks=ranks)
    torch.set_num_threads(setting.threads)
    stream = ours.batches(config, step.layout.micro_batch)
    network, device = step.state.main.network.module, step.state.strategy.device
    gradients = torch.zeros(sum(p.numel() for p in network.parameters()), device=device)

    def local_step() -> None:
        with network.no_sync():  # type: ignore[operator]
            ours.take(step, stream)

    def all_reduce() -> None:
        if ranks > 1:
            dist.all_reduce(gradients)

    def timed(action: Callable[[], None], count: int) -> float:
        if ranks > 1:
            dist.barrier()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            action()
        synchronize(device)
        return (time.perf_counter() - started) / count

    try:
        while True:
            if pipe.recv() == "bytes":
                pipe.send(_bytes_per_step(lambda: ours.take(step, stream)))
                continue
            whole = timed(lambda: ours.take(step, stream), setting.steps)
            local = timed(local_step, setting.steps) if ranks > 1 else whole
            pipe.send(Seconds(step=whole, local=local, all_reduce=timed(all_reduce, setting.steps)))
    except EOFError:
        if dist.is_initialized():
            dist.destroy_process_group()


def _bytes_per_step(step: Callable[[], None]) -> int:
    """Gradients that a rank gives to be averaged in one step."""
    counted = 0

    def counting(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal counted
        counted += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    with mock.patch.object(data_parallel, "allreduce_hook", counting):
        step()
    return counted


class Group:
    """`ranks` processes that train together when it is their turn."""

    def __init__(self, ranks: int, setting: Setting) -> None:
        self.ranks = ranks
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, ranks, port, setting, theirs))
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def ask(self, question: str) -> list[Any]:
        """Every rank's answer. RuntimeError where one is gone; what it died of is on stderr."""
        try:
            for pipe in self._pipes:
                pipe.send(question)
            return [pipe.recv() for pipe in self._pipes]
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{self.ranks} ranks: one ended before its turn was over") from error

    def turn(self) -> Seconds:
        """The slowest rank's times."""
        turns = self.ask("turn")
        names = [field.name for field in fields(Seconds)]
        return Seconds(**{name: max(getattr(turn, name) for turn in turns) for name in names})

    def close(self) -> None:
        """Let them end."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()


def measured(setting: Setting, counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each number of ranks; ratios are medians over the rounds, of turns of one round."""
    groups = [Group(ranks, setting) for ranks in counts]
    try:
        for group in groups:
            group.turn()  # for the caches
        turns = [[group.turn() for group in groups] for _ in range(rounds)]
        sizes = [group.ask("bytes")[0] for group in groups]
    finally:
        for group in groups:
            group.close()
    devices = torch.cuda.device_count() if torch.cuda.is_available() else max(1, cores() // setting.threads)
    rows = []
    for number, ranks in enumerate(counts):
        own = [round_[number] for round_ in turns]
        ideal = min(ranks, devices) / ranks  # of the speed of ranks that have a device each
        efficiencies = sorted(round_[0].step / round_[number].step / ideal for round_ in turns)
        step, local, all_reduce = (
            statistics.median(getattr(turn, field.name) for turn in own) for field in fields(Seconds)
        )
        rows.append(
            {
                "ranks": ranks,
                "images_per_second": ranks * setting.batch / step,
                "efficiency": statistics.median(efficiencies),
                "lowest_efficiency": efficiencies[0],
                "highest_efficiency": efficiencies[-1],
                "step": step,
                "local": local,
                "all_reduce": all_reduce,
                "overlap": hidden_share(own) if ranks > 1 else None,
                "bytes_per_step": sizes[number],
            }
        )
    return rows


def hidden_share(turns: list[Seconds]) -> float:
    """Of the all-reduce's time, what a step does not get longer by: from 0 to 1, the median of the turns."""
    shares = [1 - (turn.step - turn.local) / turn.all_reduce for turn in turns]
    return min(1.0, max(0.0, statistics.median(shares)))


def print_tables(rows: list[dict[str, Any]], model: list[dict[str, float]], head: str, assumed: str) -> None:
    """For a person."""
    print(head)
    columns = f"{'step ms':>9}{'local':>8}{'reduce':>8}{'hidden':>8}{'MB':>7}"
    print(f"{'ranks':>5}{'images/s':>10}{'efficiency':>12}{'':<15}{columns}")
    for row in rows:
        spread = f"  {row['lowest_efficiency']:.2f} to {row['highest_efficiency']:.2f}"
        hidden = "" if row["overlap"] is None else f"{row['overlap']:.0%}"
        print(
            f"{row['ranks']:>5}{row['images_per_second']:>10.2f}{row['efficiency']:>12.2f}{spread:<15}"
            f"{1e3 * row['step']:>9.0f}{1e3 * row['local']:>8.0f}{1e3 * row['all_reduce']:>8.0f}{hidden:>8}"
            f"{row['bytes_per_step'] / 1e6:>7.1f}"
        )
    print(f"on paper, {assumed}")
    print(f"{'nodes':>5}{'ranks':>10}{'step ms':>12}{'efficiency':>12}")
    for row in model:
        print(f"{row['nodes']:>5}{row['ranks']:>10}{1e3 * row['step']:>12.1f}{row['efficiency']:>12.2f}")


def main() -> None:
    """Measure, model, print, write JSON."""
    on_gpu = torch.cuda.is_available()
    most = torch.cuda.device_count() if on_gpu else 4
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/cifar10.toml" if on_gpu else "configs/demo.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", dest="overrides")
    parser.add_argument("--batch", type=int, default=128 if on_gpu else 16, help="images of a rank in a step")
    counts = [2**power for power in range(most.bit_length())]
    parser.add_argument("--ranks", type=int, nargs="+", default=counts, help=f"default {counts}; the first is 1")
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 4, help="in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a rank on a CPU")
    parser.add_argument("--step-seconds", type=float, help="of one rank, for the model; default: as measured here")
    parser.add_argument("--parameters", type=float, help="of the model's network; default: the bytes counted here / 4")
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--node-bandwidth", type=float, default=400, help="GB/s of a rank within its node")
    parser.add_argument("--link-bandwidth", type=float, default=50, help="GB/s of a node to the others, all its cards")
    parser.add_argument("--nodes", type=int, default=64, help="the most, for the model")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/scaling.json"))
    arguments = parser.parse_args()
    if arguments.ranks[0] != 1:
        parser.error("--ranks: begins with 1, to which the others are compared")
    setting = Setting(
        config=arguments.config,
        overrides=tuple(arguments.overrides),
        batch=arguments.batch,
        steps=arguments.steps,
        threads=arguments.threads,
    )
    rows = measured(setting, arguments.ranks, arguments.rounds)
    overlap = next((row["overlap"] for row in rows if row["ranks"] == 2), 0.0)
    gradient_bytes = 4 * arguments.parameters if arguments.parameters else rows[-1]["bytes_per_step"]
    compute = arguments.step_seconds or rows[0]["step"]
    links = Links(node=1e9 * arguments.node_bandwidth, network=1e9 * arguments.link_bandwidth)
    model = modelled(
        compute,
        gradient_bytes,
        ranks_per_node=arguments.ranks_per_node,
        links=links,
        overlap=overlap,
        most_nodes=arguments.nodes,
    )
    about = describe(default_device(), arguments.threads, "accelerate")
    head = f"{arguments.config.stem}, batch {arguments.batch} a rank, {arguments.rounds} rounds of {arguments.steps} "
    assumed = (
        f"{1e3 * compute:.1f} ms to compute a step, {gradient_bytes / 1e6:.1f} MB of gradients, {overlap:.0%} hidden, "
        f"{arguments.node_bandwidth:g} GB/s within a node of {arguments.ranks_per_node}, "
        f"{arguments.link_bandwidth:g} GB/s between nodes"
    )
    print_tables(rows, model, f"{head}steps; {about}", assumed)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "arguments": vars(arguments), "rows": rows, "assumed": assumed, "model": model}
    arguments.json.write_text(json.dumps(content, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
