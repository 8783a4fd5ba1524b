"""Do the signals of progress tell of progress? The demo, with held-out images and features looked at while it trains.

    python benchmarks/progress.py [--out runs/progress] [--picture docs/progress.png]

Trains configs/demo.toml on two processes with a tenth of the images held out, measures loss on these and the distance
by features every 75 steps, and draws both against images seen. Killed, it goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib as mpl

from trainer.config import Config
from trainer.telemetry.metrics import read_metrics

mpl.use("Agg")
from matplotlib import pyplot as plt

CONFIG = Path("configs/demo.toml")
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
SETTINGS = {
    "data.holdout": "0.1",
    "log.validate_every": "75 steps",
    "log.validate_images": "500",
    "log.distance_every": "75 steps",
    "log.distance_samples": "128",
    "log.samples_every": "0 steps",
}


def main() -> None:
    """Train, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/progress"), help="the run (default runs/progress)")
    parser.add_argument("--picture", type=Path, default=Path("docs/progress.png"), help="default docs/progress.png")
    arguments = parser.parse_args()
    config = Config.load(CONFIG)
    assert config.data.path is not None
    prepare = ["-m", "data_prep", "embedded:mnist5k", config.data.path, "--size", str(config.model.image_size)]
    subprocess.run([sys.executable, *prepare], check=True)
    settings = [f"{name}={value}" for name, value in {"run_dir": arguments.out, **SETTINGS}.items()]
    sets = [argument for setting in settings for argument in ("--set", setting)]
    subprocess.run([sys.executable, *LAUNCH, "trainer/train.py", "--config", str(CONFIG), *sets], check=True)
    draw(arguments.out, config.train.global_batch, arguments.picture)


def draw(run: Path, global_batch: int, path: Path) -> None:
    """Above the loss on held-out images, below the distance of samples from them."""
    figure, (loss, distance) = plt.subplots(2, 1, figsize=(6, 5), sharex=True)
    records = read_metrics(run / "logs")

    def curve(name: str) -> tuple[list[float], list[float]]:
        points = [(record["step"] * global_batch / 1000, record[name]) for record in records if name in record]
        return [images for images, _ in points], [value for _, value in points]

    loss.plot(*curve("train/loss"), label="training", color="0.7", linewidth=1)
    loss.plot(*curve("validation/loss"), label="held out, weights", marker=".")
    loss.plot(*curve("validation/ema_loss"), label="held out, average", marker=".")
    loss.set(ylabel="L_simple", yscale="log")
    loss.legend(fontsize=8)
    distance.plot(*curve("validation/feature_distance"), color="C2", marker=".")
    distance.set(xlabel="thousand images seen", ylabel="distance by features", yscale="log")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
