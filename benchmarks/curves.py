"""Loss curves of the fast arithmetic and of plain float32, on the demo's digits: the same images, timesteps and noise.

    python benchmarks/curves.py [--steps 500] [--batch 32] [--picture docs/curves.png]

Trains configs/demo.toml's network from one seed in each way of `WAYS`, prints how far each curve is from float32's, and
draws them. What the ways are given is equal to the bit, so whatever the curves differ by is arithmetic. Killed, it goes
on; finished runs are not trained again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from trainer.arguments import at_least_one
from trainer.config import Config
from trainer.telemetry.metrics import read_metrics

mpl.use("Agg")
from matplotlib import pyplot as plt

CONFIG, DATA = Path("configs/demo.toml"), Path("data/mnist16")
REFERENCE = "float32"
WAYS: dict[str, list[str]] = {
    REFERENCE: [],
    "bfloat16": ["train.precision=bf16"],
    "bfloat16, compiled": ["train.precision=bf16", "train.compile=regional"],
}
LOGGED = 5  # steps between two points

Curve = npt.NDArray[np.float64]


def main() -> int:
    """Train, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=at_least_one, default=500, help="of each run (default 500)")
    parser.add_argument("--batch", type=at_least_one, default=32, help="images a step (default 32)")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"), help="default runs/curves")
    parser.add_argument("--picture", type=Path, default=Path("docs/curves.png"), help="default docs/curves.png")
    arguments = parser.parse_args()

    if not DATA.exists():
        size = str(Config.load(CONFIG).model.image_size)
        subprocess.run([sys.executable, "-m", "data_prep", "embedded:mnist5k", str(DATA), "--size", size], check=True)
    curves = {
        way: train(arguments.out / way.replace(", ", "-"), settings, arguments.steps, arguments.batch)
        for way, settings in WAYS.items()
    }
    print(f"loss of the last fifth of {arguments.steps} steps, and its largest distance to {REFERENCE} at any point")
    for way, curve in curves.items():
        tail = curve[-len(curve) // 5 :].mean()
        print(f"{way:<20} {tail:.4f}  {np.abs(curve - curves[REFERENCE]).max():.1e}")
    draw(curves, arguments.picture)
    return 0


def train(run: Path, settings: list[str], steps: int, batch: int) -> Curve:
    """Train a run to its end, should it not be there, and return its loss, a mean for every `LOGGED` steps."""
    chosen = [
        *(f"run_dir={run}", f"train.duration={steps} steps", f"train.global_batch={batch}"),
        *(f"log.every={LOGGED} steps", "log.samples_every=0 steps", "checkpoint.every=100 steps", *settings),
    ]
    if not (run / "DONE").exists():
        sets = [argument for setting in chosen for argument in ("--set", setting)]
        subprocess.run([sys.executable, "trainer/train.py", "--config", str(CONFIG), *sets], check=True)
    return np.array([record["train/loss"] for record in read_metrics(run / "logs") if "train/loss" in record])


def draw(curves: dict[str, Curve], path: Path) -> None:
    """The curves above, their differences to the reference below."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 5), height_ratios=[2, 1], sharex=True)
    for number, (way, curve) in enumerate(curves.items()):
        steps = LOGGED * np.arange(1, len(curve) + 1)
        style = {"color": f"C{number}", "linewidth": 1}
        above.plot(steps, curve, label=way, linestyle="-" if way == REFERENCE else "--", **style)
        if way != REFERENCE:
            below.plot(steps, np.abs(curve - curves[REFERENCE]) + 1e-9, **style)
    above.set(ylabel="training loss", yscale="log")
    above.legend(fontsize=8)
    below.set(xlabel="step", ylabel=f"distance to {REFERENCE}", yscale="log")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    sys.exit(main())
