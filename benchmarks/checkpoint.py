"""Saving and loading the whole state of a run, by strategy, beside torch.distributed.checkpoint on the same tensors.

    python benchmarks/checkpoint.py                      # the 114 M network, 2 processes
    python benchmarks/checkpoint.py --config configs/cifar10.toml --strategies ddp zero3 --ranks 4

stall: how long training stands still; written: until the checkpoint has its name, every byte read back and hashed.
The limit is the time that a plain write of the same bytes and fsync takes, by as many processes.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.engine.build import build_state
from trainer.engine.checkpointing.checkpoints import Checkpoints, open_verified
from trainer.engine.state.train_state import TrainState
from trainer.engine.strategies import make_strategy

STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the slowest rank, and the result."""
    _meet()
    started = time.perf_counter()
    result = action()
    spent = torch.tensor(time.perf_counter() - started)
    if dist.is_initialized():
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return spent.item(), result


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def peak_memory() -> int:
    """Bytes that this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plain_write(state: TrainState, folder: Path) -> None:
    """This rank's share, as one file of bytes, on disk."""
    with (folder / f"plain-{os.environ.get('RANK', '0')}").open("wb") as file:
        for piece in state.contents().slices:
            piece.values.detach().reshape(-1).numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())


def with_dcp(state: TrainState, folder: Path) -> tuple[float, float, float]:
    """torch.distributed.checkpoint: stall of async_save, save, load, of the same share of the tensors."""
    tensors = {piece.name: piece.values for piece in state.contents().slices}
    stall, pending = timed(lambda: dcp.async_save(tensors, checkpoint_id=folder / "dcp-async"))
    pending.result()
    save, _ = timed(lambda: dcp.save(tensors, checkpoint_id=folder / "dcp"))
    load, _ = timed(lambda: dcp.load(tensors, checkpoint_id=folder / "dcp"))
    return stall, save, load


def measure(config: Config, strategy_name: str, folder: Path) -> tuple[list[dict[str, Any]], TrainState]:
    """Rows of the table for one strategy, and what was saved; run by every rank."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    train = config.train.model_copy(update={"strategy": strategy_name})
    layout = BatchLayout.plan(config.train.global_batch, ranks, 1)
    strategy = make_strategy(train, micro_batch=layout.micro_batch, accumulation=layout.accumulation)
    state = build_state(config, strategy)
    checkpoints = Checkpoints(folder, strategy.accelerator)
    bytes_ = sum(4 * shape.numel() for shape in state.contents().shapes.values())

    limit, _ = timed(lambda: plain_write(state, folder))
    before = peak_memory()
    stall, saving = timed(lambda: checkpoints.begin(state.contents(), step=1, identity={}))
    rest, path = timed(lambda: checkpoints.finish(saving))
    memory = peak_memory() - before
    verify, _ = timed(lambda: checkpoints.check(path))

    def load() -> None:
        reader, manifest = open_verified(path)
        state.load(reader, manifest["state"])

    read, _ = timed(load)
    spread, _ = timed(state.weights_changed)
    row = {
        "name": f"{strategy_name} x {ranks}",
        "gigabytes": bytes_ / 1e9,
        "stall": stall,
        "written": stall + rest,
        "over_plain_write": (stall + rest) / limit,
        "verify": verify,
        "load": read + spread,
        "memory_per_rank": memory,
    }
    rows = [row]
    if strategy_name == "ddp" and ranks > 1:
        stall, save, load_ = with_dcp(state, folder)
        rows.append({"name": f"dcp, ddp x {ranks}", "gigabytes": bytes_ / 1e9, "stall": stall, "written": save})
        rows[-1] |= {"over_plain_write": save / limit, "load": load_}
    strategy.accelerator.end_training()
    return rows, state


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/lsun256.toml"))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/checkpoint.json"))
    parser.add_argument("--as-rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank_of:
        rows, _state = measure(Config.load(arguments.config), arguments.as_rank_of, arguments.folder)
        if os.environ.get("RANK", "0") == "0":
            (arguments.folder / "rows.json").write_text(json.dumps(rows))
        os._exit(0)  # after an asynchronous save by torch, taking the state apart waits for ever now and then

    rows = []
    for strategy in arguments.strategies:
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.folder))
        ranks = ["--standalone", "--nproc_per_node", str(arguments.ranks)]
        ours = [__file__, "--config", str(arguments.config), "--folder", str(folder), "--as-rank-of", strategy]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *ranks, *ours], check=True, env=environment)
        rows += json.loads((folder / "rows.json").read_text())
        shutil.rmtree(folder)
    about = f"{arguments.config.stem}, {platform.processor() or platform.machine()}, torch {torch.__version__}"
    print(f"{about}; seconds")
    print(f"{'':<16}{'GB':>7}{'stall':>8}{'written':>9}{'/ plain':>9}{'verify':>8}{'load':>8}{'GB more a rank':>16}")
    for row in rows:
        print(
            f"{row['name']:<16}{row['gigabytes']:>7.2f}{row['stall']:>8.2f}{row['written']:>9.2f}"
            f"{row['over_plain_write']:>9.2f}{row.get('verify', float('nan')):>8.2f}{row['load']:>8.2f}"
            f"{row.get('memory_per_rank', float('nan')) / 1e9:>16.2f}"
        )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
