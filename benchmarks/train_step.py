"""One training step: ours beside the loops of others, and beside the device's measured peak.

    python benchmarks/train_step.py                                   # a size that fits the device
    python benchmarks/train_step.py --config configs/cifar10.toml --batch 128 --compile
    python benchmarks/train_step.py --also train.compile=regional

diffusers' unconditional example as it ships, in float32 and with --mixed_precision bf16, is what ratios are to; besides
it the same loop with channels-last memory and, on request, compiled. Its network is ours (equal in number and shape of
parameters); lucidrains' denoising-diffusion-pytorch has another one, so compare the share of the peak, which counts
each network's own FLOPs. A step is everything between two batches: noise, forward, backward, clipping, optimizer, EMA
and what each logs. "whole loop" is our training loop with all its telemetry. Reading data is left out of all.

Each is measured in a process of its own and in turns (turns.py); ratios are medians of those of one round.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import ours, peers
from benchmarks.machine import add_setting, default_device, describe, peak_limit, usual_precisions
from benchmarks.turns import Clock, Contender, Run, Turn, result, take_turns
from trainer.config import Config
from trainer.engine.network.build import build_network
from trainer.engine.network.cost import cost_of
from trainer.models.backbones import example_inputs


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders share."""

    config: Path
    overrides: tuple[str, ...]
    steps: int
    threads: int

    def load(self, precision: str, *further: str) -> Config:
        """The configuration in that precision."""
        return Config.load(self.config, [*self.overrides, f"train.precision={precision}", *further])


def our_step(setting: Setting, precision: str, *further: str) -> Run:
    """See `ours.train_step`."""
    return ours.train_step(setting.load(precision, *further), steps=setting.steps, threads=setting.threads)


def our_loop(setting: Setting, precision: str, *further: str) -> Run:
    """See `ours.training_loop`."""
    return ours.training_loop(setting.load(precision, *further), steps=setting.steps, threads=setting.threads)


def diffusers(setting: Setting, precision: str, changes: dict[str, bool]) -> Run:
    """See `peers.diffusers_example`."""
    config = setting.load(precision)
    return peers.diffusers_example(config, steps=setting.steps, threads=setting.threads, **changes)


def lucidrains(setting: Setting, precision: str) -> Run:
    """See `peers.lucidrains_trainer`."""
    return peers.lucidrains_trainer(setting.load(precision), steps=setting.steps, threads=setting.threads)


def contenders(setting: Setting, precision: str, *, compiled: bool, also: list[str]) -> dict[str, Contender]:
    """Those of one precision by name; the first is what the others of that precision are compared with."""

    def named(name: str, make: Any, *arguments: Any) -> tuple[str, Contender]:
        return f"{name}, {precision}", Contender(make=make, arguments=(setting, precision, *arguments))

    found = [
        named("diffusers example", diffusers, {}),
        named("diffusers, channels-last", diffusers, {"channels_last": True}),
        named("lucidrains", lucidrains),
        named("ours", our_step),
        named("ours, whole loop", our_loop),
    ]
    if compiled:
        found.insert(2, named("diffusers, ch.-last, compiled", diffusers, {"channels_last": True, "compiled": True}))
    found += [named(f"ours, {override}", our_step, override) for override in also]
    return dict(found)


def rows(turns: dict[str, list[Turn]], setting: Setting, precisions: list[str], clock: Clock) -> list[dict[str, Any]]:
    """The table: rates, ratios to the example in float32 (or the first precision) and in the same precision."""
    config = setting.load(precisions[0])
    inputs = partial(example_inputs, config.model)
    flops = {"ours": cost_of(lambda: build_network(config), inputs)}
    if any(name.startswith("lucidrains") for name in turns):
        flops["lucidrains"] = cost_of(lambda: peers.lucidrains_network(config), inputs)
    shipped = turns[f"diffusers example, {precisions[0]}"]
    table = []
    for name, own in turns.items():
        precision = name.rpartition(", ")[2]
        if name.startswith("peak"):
            continue
        to_shipped = result(name, own, shipped, clock=clock)
        to_same = result(name, own, turns[f"diffusers example, {precision}"], clock=clock)
        cost = flops["lucidrains" if name.startswith("lucidrains") else "ours"]
        limit = max(turn.images / getattr(turn, clock) for turn in turns[f"peak, {precision}"])
        rate = statistics.median(turn.images / getattr(turn, clock) for turn in own)
        table.append(
            {
                **asdict(to_shipped),
                "equal_precision": [to_same.ratio, to_same.lowest_ratio, to_same.highest_ratio],
                "parameters": cost.parameters,
                "gflops_per_image": cost.training_flops / 1e9,
                "peak_gflops": limit / 1e9,
                "of_peak": rate * cost.training_flops / limit,
            }
        )
    return table


def print_table(table: list[dict[str, Any]], head: str) -> None:
    """For a person; ratios with the lowest and the highest of all rounds."""
    print(head)
    print(f"{'':<34}{'M param.':>9}{'images/s':>10}{'/ as shipped':>14}{'/ equal precision':>28}{'of peak':>9}")
    for row in table:
        same, lowest, highest = row["equal_precision"]
        print(
            f"{row['name']:<34}{row['parameters'] / 1e6:>9.1f}{row['per_second']:>10.2f}{row['ratio']:>14.2f}"
            f"{same:>12.2f}  {lowest:.2f} to {highest:.2f}{row['of_peak']:>9.1%}"
        )


def main() -> None:
    """Measure in turns, so that a machine that slows down slows all; print a table, write JSON."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--batch", type=int, default=128 if on_gpu else 16)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16", "fp16"], default=usual_precisions())
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 4, help="in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--clock",
        choices=["cpu", "wall"],
        default="wall",
        help="of ratios; cpu, with one thread, on a machine with other work",
    )
    parser.add_argument("--compile", action="store_true", help="diffusers' network compiled, too: takes minutes")
    parser.add_argument("--also", action="append", default=[], metavar="SECTION.NAME=VALUE", help="ours with this, too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose name begins so, and the example")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/train_step.json"))
    arguments = parser.parse_args()
    setting = Setting(
        config=arguments.config,
        overrides=(f"train.global_batch={arguments.batch}", *arguments.overrides),
        steps=arguments.steps,
        threads=arguments.threads,
    )
    found: dict[str, Contender] = {}
    for precision in arguments.precisions:
        found |= contenders(setting, precision, compiled=arguments.compile, also=arguments.also)
    try:
        peers.lucidrains_network(setting.load("fp32"))
    except ModuleNotFoundError as error:
        print(f"lucidrains: left out, {error}")
        found = {name: contender for name, contender in found.items() if not name.startswith("lucidrains")}
    if arguments.only:
        kept = ("diffusers example", *arguments.only)
        found = {name: contender for name, contender in found.items() if name.startswith(kept)}
    for precision in arguments.precisions:
        found[f"peak, {precision}"] = Contender(make=peak_limit, arguments=(precision, arguments.threads))

    turns = take_turns(found, rounds=arguments.rounds)
    table = rows(turns, setting, arguments.precisions, arguments.clock)
    about = describe(default_device(), arguments.threads, "diffusers", "accelerate")
    head = f"{arguments.config.stem}, batch {arguments.batch}, {arguments.rounds} rounds of {arguments.steps} steps, "
    print_table(table, f"{head}ratios by {arguments.clock} time; {about}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "arguments": vars(arguments), "rows": table}
    arguments.json.write_text(json.dumps(content, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
