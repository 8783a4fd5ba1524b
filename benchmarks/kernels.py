"""Where a training step's time goes, by class of kernel, beside what the device allows (torch.profiler).

    python benchmarks/kernels.py                                        # ours and diffusers' example, a size that fits
    python benchmarks/kernels.py --config configs/cifar10.toml --batch 128 --precision bf16

The limit of convolutions and products is their FLOPs over the measured peak (machine.py); of all else, the bytes that
each operation reads and writes over the measured bandwidth of a copy. Fused operations would move fewer: a class that
reaches 100% can still be made faster by doing less.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from diffusers.training_utils import EMAModel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ours, peers
from benchmarks.machine import add_setting, best_rate, copy_limit, default_device, describe, peak_limit
from benchmarks.turns import Run
from trainer.config import Config
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.engine.state.ema import Averages
from trainer.engine.step import train_step as step_module
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.models.group_norm import ChannelsLastGroupNorm, GroupNorm

# By the operation's name, the first that fits; ranges that stand around operations go before.
CLASSES = {
    "convolution": ("conv",),
    "matrix product": ("mm", "linear", "attention", "flash"),
    "group norm": ("group_norm",),
    "activation": ("silu", "dropout", "bernoulli"),
    "copy, cast, cat": ("copy", "_to_", "cat", "clone", "zero", "fill", "empty", "upsample", "pad", "contiguous"),
}
CONTENDERS: dict[str, Callable[..., Run]] = {"diffusers example": peers.diffusers_example, "ours": ours.train_step}
RANGES = ("noise", "optimizer", "EMA", "group norm")
REST = "other elementwise"
CALLS = "calls"  # Python and autograd around the operations
PRODUCTS = ("convolution", "matrix product")


@dataclass
class Ranges:
    """The parts of a step that the program names itself, innermost last."""

    open: list[str] = field(default_factory=list)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its work told apart."""

        def inside(*arguments: Any, **options: Any) -> Any:
            self.open.append(name)
            try:
                with record_function(name):
                    return function(*arguments, **options)
            finally:
                self.open.pop()

        return inside

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Noise, optimizer, EMA and our group norm are ranges within."""
        places = [
            (step_module, "device_batch", "noise"),
            (KeyedNoise, "normal", "noise"),
            (GuardedAdam, "step", "optimizer"),
            (torch.optim.AdamW, "step", "optimizer"),
            (Averages, "update", "EMA"),
            (EMAModel, "step", "EMA"),
            (GroupNorm, "forward", "group norm"),
            (ChannelsLastGroupNorm, "backward", "group norm"),
        ]
        with contextlib.ExitStack() as patches:
            for owner, attribute, name in places:
                watched = self.around(name, getattr(owner, attribute))
                patches.enter_context(mock.patch.object(owner, attribute, _as_method(watched)))
            yield


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: function(*arguments, **options)


def class_of(operation: str, ranges: Sequence[str]) -> str:
    """Of an operation such as "aten::silu_", inside of named `ranges`."""
    for name in RANGES:
        if name in ranges:
            return name
    if not operation.startswith("aten"):
        return CALLS
    return next((name for name, parts in CLASSES.items() if any(part in operation for part in parts)), REST)


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, by class; views move none."""

    def __init__(self, ranges: Ranges) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._ranges = ranges

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.bytes[class_of(str(func), self._ranges.open)] += sum(tensor.nbytes for tensor in tensors)
        return out


def seconds_by_class(run: Run, steps: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Of one step, of each class the least of all rounds: the one that other work disturbed least."""
    rounds_ = [_profiled(run, steps, device) for _ in range(rounds)]
    return {kind: min(found[kind] for found in rounds_) for kind in rounds_[0]}


def _profiled(run: Run, steps: int, device: torch.device) -> dict[str, float]:
    """From the profiler: time within each operation itself, on the device where that is a GPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        run()
    found: Counter[str] = Counter()
    for event in profiler.events():
        ranges, parent = [], event.cpu_parent
        while parent is not None:
            ranges.append(parent.name)
            parent = parent.cpu_parent
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        found[class_of(event.name, [event.name, *ranges])] += spent / 1e6 / steps
    return dict(found)


def rows_of(name: str, config: Config, arguments: argparse.Namespace, limits: "Limits") -> list[dict[str, Any]]:
    """The classes of one contender, the slowest first, and their sum."""
    ranges = Ranges()
    with ranges.watching():
        run = CONTENDERS[name](config, steps=arguments.steps, threads=arguments.threads)
        run()  # for the caches
        spent = seconds_by_class(run, arguments.steps, default_device(), arguments.rounds)
        with Traffic(ranges) as traffic:
            run()
        with FlopCounterMode(display=False) as counter:
            run()
    flops = Counter[str]()
    for operation, count in counter.get_flop_counts()["Global"].items():
        flops[class_of(str(operation), [])] += count
    rows = []
    for kind, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        work = flops[kind] / limits.flops if kind in PRODUCTS else traffic.bytes[kind] / limits.bytes
        rows.append({"name": name, "class": kind, "seconds": seconds, "limit": work / arguments.steps})
    total = {key: sum(row[key] for row in rows) for key in ("seconds", "limit")}
    return [*rows, {"name": name, "class": "all", **total}]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of this device, per second."""

    flops: float
    bytes: float


def main() -> None:
    """Profile, print tables, write JSON."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--batch", type=int, default=128 if on_gpu else 16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=10 if on_gpu else 2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/kernels.json"))
    arguments = parser.parse_args()
    settings = [f"train.global_batch={arguments.batch}", f"train.precision={arguments.precision}"]
    config = Config.load(arguments.config, [*arguments.overrides, *settings])
    limits = Limits(
        flops=best_rate(peak_limit(arguments.precision, arguments.threads)),
        bytes=best_rate(copy_limit(arguments.threads)),
    )
    table = []
    for name in CONTENDERS:  # each in a process of its own, for Accelerate has one precision a process
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            table += process.submit(rows_of, name, config, arguments, limits).result()
    about = describe(default_device(), arguments.threads, "diffusers")
    print(f"{arguments.config.stem}, batch {arguments.batch}, {arguments.precision}; {about}")
    print(f"limits: {limits.flops / 1e9:.0f} GFLOP/s, a product or convolution; {limits.bytes / 1e9:.1f} GB/s, a copy")
    print(f"{'':<19}{'':<19}{'ms a step':>10}{'share':>8}{'limit ms':>10}{'reached':>9}")
    totals = {row["name"]: row["seconds"] for row in table if row["class"] == "all"}
    for row in table:
        reached = row["limit"] / row["seconds"] if row["seconds"] else 0.0
        print(
            f"{row['name']:<19}{row['class']:<19}{1e3 * row['seconds']:>10.1f}"
            f"{row['seconds'] / totals[row['name']]:>8.1%}{1e3 * row['limit']:>10.1f}{reached:>9.0%}"
        )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "arguments": vars(arguments), "limits": vars(limits), "rows": table}
    arguments.json.write_text(json.dumps(content, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
