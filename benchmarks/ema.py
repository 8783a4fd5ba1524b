"""Averaging the weights after every step: each rank its share, beside ema-pytorch and diffusers' EMAModel, which every
rank does in full.

    python benchmarks/ema.py                      # the 114 M network
    python benchmarks/ema.py --config configs/cifar10.toml --averages 3

A rank's share is measured alone in its process, so that ranks on one machine do not compete for its memory.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA

from trainer.config import Config
from trainer.engine.network.build import build_network
from trainer.engine.state.ema import Averages, constant
from trainer.engine.strategies.parameter_slices import ParameterSlice


def share(network: torch.nn.Module, ranks: int) -> list[ParameterSlice]:
    """What the busiest of `ranks` owns: parameters, the largest first, each to whoever has the least."""
    loads: list[list[ParameterSlice]] = [[] for _ in range(ranks)]
    for name, p in sorted(network.named_parameters(), key=lambda named: -named[1].numel()):
        piece = ParameterSlice(name=name, shape=p.shape, start=0, stop=p.numel(), storage=p)
        min(loads, key=lambda load: sum(other.numel for other in load)).append(piece)
    return max(loads, key=lambda load: sum(piece.numel for piece in load))


def copying(network: torch.nn.Module) -> Callable[[], object]:
    """A copy of the weights into another place."""
    copies, weights = [torch.empty_like(p) for p in network.parameters()], [p.detach() for p in network.parameters()]
    return lambda: torch._foreach_copy_(copies, weights)


def with_ema_pytorch(network: torch.nn.Module) -> Callable[[], object]:
    """Its fastest settings, every step."""
    ema = EMA(network, update_every=1, update_after_step=-1, include_online_model=False, use_foreach=True)
    return lambda: ema.update()


def with_diffusers(network: torch.nn.Module) -> Callable[[], object]:
    """As its training example has it."""
    ema = EMAModel(network.parameters(), decay=0.9999)
    return lambda: ema.step(network.parameters())


def median_seconds(action: Callable[[], object], rounds: int) -> float:
    """After two rounds to warm up."""
    times = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/lsun256.toml"))
    parser.add_argument("--averages", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/ema.json"))
    arguments = parser.parse_args()
    config = Config.load(arguments.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_network(config).to(device)
    rows: list[tuple[str, float, int]] = []

    whole = sum(parameter.numel() for parameter in network.parameters())
    limit = median_seconds(copying(network), arguments.rounds)
    for name, make in (("ema-pytorch", with_ema_pytorch), ("diffusers", with_diffusers)):
        rows.append((name, arguments.averages * median_seconds(make(network), arguments.rounds), whole))
    for ranks in (1, 2, 4, 8):
        owned = share(network, ranks)
        averages = Averages(owned, {f"{n}": constant(config.train.ema_decay) for n in range(arguments.averages)})
        elements = sum(piece.numel for piece in owned)
        seconds = median_seconds(functools.partial(averages.update, 1), arguments.rounds)
        rows.append((f"ours, {ranks} ranks", seconds, elements))

    about = f"{arguments.config.stem}, {arguments.averages} averages, {platform.processor() or platform.machine()}, "
    about += f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{about}\nthe limit, a copy of the weights: {1e3 * limit:.1f} ms")
    print(f"{'':<16}{'ms':>8}{'ratio':>8}{'/ limit':>9}{'GB':>7}")
    table = [
        {
            "name": name,
            "milliseconds": 1e3 * seconds,
            "ratio": rows[0][1] / seconds,
            "over_limit": seconds / limit,
            "gigabytes": 4e-9 * elements * arguments.averages,
        }
        for name, seconds, elements in rows
    ]
    for row in table:
        print(
            f"{row['name']:<16}{row['milliseconds']:>8.1f}{row['ratio']:>8.2f}{row['over_limit']:>9.2f}"
            f"{row['gigabytes']:>7.2f}"
        )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"about": about, "limit_milliseconds": 1e3 * limit, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
