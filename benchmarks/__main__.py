"""All benchmarks of speed and memory, one after the other, at sizes that fit the device: minutes on a CPU.

    python -m benchmarks
    python -m benchmarks train_step sampling     # only these

Each can be run alone, with arguments (`python benchmarks/train_step.py --help`). Tables go to the terminal, figures to
benchmarks/out/. On a machine with other work, read the ratios: those are of runs in turns.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
# What makes a benchmark fit a CPU and minutes. On a GPU, the defaults of those that compute there are its sizes.
SMALL: dict[str, list[str]] = {
    "train_step": ["--rounds", "3", "--steps", "2"],
    "kernels": ["--rounds", "3"],
    "sampling": ["--rounds", "3", "--ddpm-steps", "10", "--ddim-steps", "10"],
    "scaling": ["--rounds", "3"],
    "telemetry": ["--rounds", "3", "--no-turns"],
    "ema": ["--config", "configs/cifar10.toml", "--rounds", "5"],
    "checkpoint": ["--config", "configs/cifar10.toml", "--strategies", "ddp", "zero2"],
    "data": ["--images", "300", "--size", "128", "--rounds", "3", "--kinds", "jpeg 75 4:2:0", "webp lossless"],
    "prepare": ["--images", "60", "--size", "128", "--rounds", "3"],
}
ON_THE_HOST = ("checkpoint", "data", "prepare")


def main() -> int:
    """Run them; the exit code says whether all ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(SMALL)}")
    chosen = parser.parse_args().names or list(SMALL)
    if unknown := set(chosen) - set(SMALL):
        parser.error(f"{', '.join(sorted(unknown))}: no such benchmark; there are {', '.join(SMALL)}")
    failed = []
    for name in chosen:
        small = name in ON_THE_HOST or not torch.cuda.is_available()
        print(f"\n== {name}", flush=True)
        command = [sys.executable, str(FOLDER / f"{name}.py"), *(SMALL[name] if small else [])]
        if subprocess.run(command, cwd=FOLDER.parent).returncode:
            failed.append(name)
    if failed:
        print(f"error: ended badly: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
