"""What the machine gives at most: the limits that every figure is held against, and its name."""

import argparse
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.turns import Run, load
from trainer.engine.network.precision import cpu_lacks_bf16

_REPEATS = 32  # in one measurement of a limit, so that it takes about as long as a contender's turn
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usual_precisions() -> list[str]:
    """What to measure unless told: bf16 too, but not on a CPU without it, where a step can take ten times as long."""
    return ["fp32"] if default_device().type == "cpu" and cpu_lacks_bf16() else ["fp32", "bf16"]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def describe(device: torch.device, threads: int, *libraries: str) -> str:
    """One line for the head of a table: device, threads, load, versions of torch and the `libraries`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    versions = ", ".join(f"{library} {version(library)}" for library in ("torch", *libraries))
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {load()}; {versions}"


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall time of an action, its work on the device included."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for the device's work; a CPU's is done when the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_limit(precision: str, threads: int) -> Run:
    """The faster of a large square product and a large convolution: on some CPUs their libraries differ by much.

    What it returns are FLOPs, so that its "images" per second are FLOP/s.
    """
    torch.set_num_threads(threads)
    device, dtype = default_device(), DTYPES[precision]
    on_gpu = device.type == "cuda"
    side, channels, batch = (8192, 1024, 64) if on_gpu else (1024, 256, 4)
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype).requires_grad_(False)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    image = torch.randn(batch, channels, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)

    def product() -> int:
        for _ in range(_REPEATS):
            one @ other
        synchronize(device)
        return _REPEATS * 2 * side**3

    def convolution() -> int:
        for _ in range(_REPEATS):
            layer(image)
        synchronize(device)
        return _REPEATS * 2 * layer.weight.numel() * batch * 16 * 16

    return max(product, convolution, key=best_rate)


def copy_limit(threads: int) -> Run:
    """Copies of an array too large for any cache; it returns bytes, each read and written: "images" are bytes."""
    torch.set_num_threads(threads)
    device = default_device()
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)

    def run() -> int:
        for _ in range(_REPEATS):
            target.copy_(source)
        synchronize(device)
        return _REPEATS * 2 * source.nbytes

    return run


def best_rate(run: Run, *, rounds: int = 3) -> float:
    """The highest of the rates by the wall clock: the one that other work disturbed least."""
    run()
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        amount = run()
        rates.append(amount / (time.perf_counter() - started))
    return max(rates)


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Options of what is measured, and on how much of the machine: --config, --set (`overrides`), --threads."""
    default = Path("configs/cifar10.toml" if torch.cuda.is_available() else "configs/demo.toml")
    parser.add_argument("--config", type=Path, default=default)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", dest="overrides")
    parser.add_argument("--threads", type=int, default=cores(), help="of a CPU")
