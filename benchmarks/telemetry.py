"""What the meters and the average cost of a training step.

    python benchmarks/telemetry.py [--config configs/cifar10.toml] [--batch 8] [--micro-batch 4] [--rounds 8]

First by their own time: each call of theirs in a step is timed, beside the whole step, so that a busy machine slows
both; a log line counts for its share of `log.every` steps. Then the check of the whole, in turns (turns.py): steps
without meters and average, with the average, with both, each in a process of its own, by CPU time.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import functools
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.machine import usual_precisions
from benchmarks.turns import Contender, Run, compare, load
from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.engine.build import build_state
from trainer.engine.monitoring.run_telemetry import Telemetry
from trainer.engine.run_folder import RunFolder
from trainer.engine.state.ema import Averages
from trainer.engine.step import phase_step
from trainer.engine.step.gradient_noise import GradientSquare
from trainer.engine.step.step_report import PendingVerdict
from trainer.engine.step.train_step import TrainStep
from trainer.engine.strategies import DataParallel
from trainer.signals import StopRequest
from trainer.telemetry.meters import STEP_SUMS

# What is called for telemetry alone. `PendingVerdict.read` is more than that: the step is settled by it.
METERS: dict[str, list[tuple[Any, str]]] = {
    "loss by timestep, bound": [(phase_step, "step_sums")],
    "gradient noise scale": [(GradientSquare, "after_micro_batch"), (GradientSquare, "read")],
    "verdict, clocks, progress": [(PendingVerdict, "read"), (Telemetry, "count"), (Telemetry, "queued")],
    "log lines": [(Telemetry, "log")],
}
AVERAGE = {"average of the weights": [(Averages, "update")]}


def training(config: Config, folder: Path) -> Callable[[bool], None]:
    """A function that takes one step as the training loop does, and writes a log line if it is told to."""
    strategy = DataParallel(config.train)
    if strategy.device.type == "cpu":
        torch.set_num_threads(1)  # a thread's CPU time is then all that was spent
    state = build_state(config, strategy)
    layout = BatchLayout.plan(config.train.global_batch, 1, config.train.micro_batch)
    train_step = TrainStep(
        config=config,
        layout=layout,
        state=state,
        stop=StopRequest(),
    )
    telemetry = Telemetry(
        config=config,
        layout=layout,
        samples=50_000,
        state=state,
        folder=RunFolder(folder, writes=True),
    )
    stream = telemetry.timed(_images(config, layout))

    def take(logs: bool) -> None:
        pending = train_step.update(train_step.backward(stream))
        telemetry.queued()
        verdict = pending.read()
        state.main.updated()
        telemetry.count(verdict)
        if logs:
            telemetry.log()

    return take


def _images(config: Config, layout: BatchLayout) -> Iterator[dict[str, torch.Tensor]]:
    model, size = config.model, layout.micro_batch
    images = torch.randint(0, 256, (size, *model.image_shape), dtype=torch.uint8)
    for first in itertools.count(0, size):
        yield {"image": images, "position": torch.arange(first, first + size)}


def now() -> float:
    """On a GPU the time when all that was queued is done, else this thread's CPU time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def own_times(config: Config, rounds: int) -> dict[str, float]:
    """Seconds a step of each of METERS, of the AVERAGE and of the "whole step", log lines excluded from that."""
    spent = dict.fromkeys([*METERS, *AVERAGE, "whole step"], 0.0)

    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = now()
            result = original(*args, **kwargs)
            spent[name] += now() - began
            return result

        return call

    every = max(1, config.log.every.steps(config.train.global_batch))
    with tempfile.TemporaryDirectory() as folder:
        take = training(config, Path(folder))
        take(True)
        for name, places in {**METERS, **AVERAGE}.items():
            for owner, attribute in places:
                setattr(owner, attribute, timed(name, getattr(owner, attribute)))
        for _ in range(rounds):
            began = now()
            take(True)
            spent["whole step"] += now() - began
    spent["whole step"] -= spent["log lines"]
    spent["log lines"] /= every
    spent["whole step"] += spent["log lines"]
    return {name: seconds / rounds for name, seconds in spent.items()}


def steps(config: Config, folder: str, *, metered: bool, averaged: bool) -> Run:
    """A contender: one step a turn, with or without meters and average. Without, they are taken out of this process."""
    if not metered:
        nothing = torch.zeros(STEP_SUMS, device="cuda" if torch.cuda.is_available() else "cpu")
        phase_step.step_sums = lambda *_, **__: nothing
        GradientSquare.after_micro_batch = lambda *_: None  # type: ignore[method-assign]
        Telemetry.count = lambda *_: None  # type: ignore[method-assign]
        Telemetry.queued = lambda *_: None  # type: ignore[method-assign]
    if not averaged:
        Averages.update = lambda *_: None  # type: ignore[method-assign]
    take = training(config, Path(folder))

    def run() -> int:
        take(False)
        return config.train.global_batch

    return run


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/cifar10.toml"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8, help="steps; some meters work in every fourth")
    parser.add_argument("--no-turns", action="store_true", help="own times alone")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/telemetry.json"))
    arguments = parser.parse_args()
    batch = [f"train.global_batch={arguments.batch}", f"train.micro_batch={arguments.micro_batch}"]
    config = Config.load(arguments.config, batch)
    if config.train.precision == "bf16" and "bf16" not in usual_precisions():
        config = Config.load(arguments.config, [*batch, "train.precision=fp32"])
    own = own_times(config, arguments.rounds)
    shares = {name: seconds / own["whole step"] for name, seconds in own.items()}
    shares["telemetry"] = sum(shares[name] for name in METERS)
    shares["average and telemetry"] = shares["telemetry"] + sum(shares[name] for name in AVERAGE)

    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    about = f"{arguments.config.stem}, batch {arguments.batch} in micro-batches of {arguments.micro_batch}, "
    about += f"{config.train.precision}, a log line every {config.log.every}, "
    about += f"{kind}, {load()}, torch {torch.__version__}"
    print(f"{about}\n{'own time':<28}{'ms a step':>11}{'of a step':>11}")
    for name, share in shares.items():
        print(f"{name:<28}{1e3 * share * own['whole step']:>11.3f}{share:>11.3%}")

    results = []
    if not arguments.no_turns:
        with tempfile.TemporaryDirectory() as folder:
            contenders = {
                name: Contender(
                    make=functools.partial(steps, metered=metered, averaged=averaged),
                    arguments=(config, f"{folder}/{number}"),
                )
                for number, (name, metered, averaged) in enumerate(
                    [("neither", False, False), ("average", False, True), ("average and telemetry", True, True)]
                )
            }
            results = compare(contenders, reference="neither", rounds=arguments.rounds)
        print(f"{'in turns':<28}{'img/CPU s':>11}{'ratio':>11}")
        for result in results:
            spread = f"  {result.lowest_ratio:.3f} to {result.highest_ratio:.3f}"
            print(f"{result.name:<28}{result.per_cpu_second:>11.2f}{result.ratio:>11.3f}{spread}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "seconds": own, "shares": shares, "turns": [vars(result) for result in results]}
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
