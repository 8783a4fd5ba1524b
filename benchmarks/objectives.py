"""The six objectives of Ho et al. 2020, table 2, and L_hybrid, at equal compute on the demo's digits.

python benchmarks/objectives.py --steps 600

Each trains configs/demo.toml's network for the same number of steps from the same seed, then gives bits/dim of training
images and two distances of samples to them: the energy distance of pixels, and the kernel distance (an unbiased
maximum mean discrepancy, as KID has it) of EfficientNet-Lite0's features. Neither is FID, and so small a network after
so few steps says nothing of the paper's: it shows that each objective trains, and which are hard. Killed, it goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from PIL import Image

from trainer.arguments import at_least_one
from trainer.config import Config
from trainer.evaluation.images import open_images
from trainer.features.kernel_distance import squared_mmd
from trainer.features.networks import EfficientNetLite0, extract

Images = npt.NDArray[np.uint8]

DATA = Path("data/mnist16")
RAW = ("--weights", "model")  # an average over so few steps would still remember how they began
OBJECTIVES = {
    "mu, L, learned diagonal variance": ("mu", "bound", "learned"),
    "mu, L, fixed variance": ("mu", "bound", "large"),
    "mu, mean squared error": ("mu", "mse", "large"),
    "eps, L, learned diagonal variance": ("eps", "bound", "learned"),
    "eps, L, fixed variance": ("eps", "bound", "large"),
    "eps, L_simple": ("eps", "mse", "large"),
    "eps, L_hybrid, learned range": ("eps", "hybrid", "learned-range"),
}


def main() -> int:
    """Train, judge, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=at_least_one, default=600, help="of 64 images (default 600)")
    parser.add_argument("--images", type=at_least_one, default=100, help="images for bits/dim (default 100)")
    parser.add_argument("--samples", type=at_least_one, default=256, help="samples for the distances (default 256)")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), help="default runs/objectives")
    arguments = parser.parse_args()
    _run("-m", "data_prep", "embedded:mnist5k", str(DATA), "--size", "16")
    real = _real(2 * arguments.samples)
    one_half, other_half = real[::2], real[1::2]
    rows = [{"objective": "training images", **_distances(one_half, other_half)}]
    for title, choice in OBJECTIVES.items():
        run = arguments.out / "-".join(choice)
        _train(run, choice, arguments.steps)
        bound = _bound(run, arguments.steps, arguments.images)
        rows.append(
            {"objective": title, **bound, **_distances(_samples(run, arguments.steps, arguments.samples), one_half)}
        )
        (arguments.out / "objectives.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(_table(rows))
    return 0


def _train(run: Path, choice: tuple[str, str, str], steps: int) -> None:
    prediction, loss, variance = choice
    settings = {
        "run_dir": run,
        "train.duration": f"{steps} steps",
        "log.samples_every": "0 steps",
        "diffusion.prediction": prediction,
        "diffusion.loss": loss,
        "diffusion.variance": variance,
    }
    overrides = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    _run("trainer/train.py", "--config", "configs/demo.toml", *overrides)


def _bound(run: Path, steps: int, images: int) -> dict[str, float]:
    out = run / "evaluation" / f"bound-{steps}-{images}"
    _run("trainer/evaluate.py", "bpd", "--run", str(run), *RAW, "--images", str(images), "--out", str(out))
    report = json.loads((out / "bpd.json").read_text())
    return {"bits_per_dim": report["bits_per_dim"], "standard_error": report["standard_error"]}


def _samples(run: Path, steps: int, count: int) -> Images:
    out = run / "samples" / f"judged-{steps}-{count}"
    how = ("--n", str(count), "--respacing", "100", "--batch", "64", "--out", str(out))
    _run("trainer/sample.py", "--run", str(run), *RAW, *how)
    return np.stack([np.asarray(Image.open(out / f"{number:06d}.png")) for number in range(count)])


def _real(count: int) -> Images:
    config = Config.load(Path("configs/demo.toml"))
    images = open_images(config, DATA, held_out=False, count=count).load(range(count))
    return ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()


def _distances(images: Images, real: Images) -> dict[str, float]:
    x, y = (torch.from_numpy(part).flatten(1).double() / 255 for part in (images, real))
    energy = (
        2 * torch.cdist(x, y).mean() - _mean_off_diagonal(torch.cdist(x, x)) - _mean_off_diagonal(torch.cdist(y, y))
    )
    return {"energy_distance": energy.item(), "kernel_distance": squared_mmd(_features(images), _features(real))}


def _mean_off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix.sum() - matrix.diagonal().sum()) / (len(matrix) * (len(matrix) - 1))


def _features(images: Images) -> torch.Tensor:
    """EfficientNet-Lite0's pooled features of grey images: (N, 1280)."""
    network = EfficientNetLite0(torch.device("cpu"))
    return extract(network, rearrange(torch.from_numpy(images), "n h w -> n 1 h w"))["features"]


def _table(rows: list[dict[str, object]]) -> str:
    lines = ["| objective | bits/dim | energy distance | kernel distance |", "|---|---|---|---|"]
    for row in rows:
        bits = f"{row['bits_per_dim']:.3f} +- {row['standard_error']:.3f}" if "bits_per_dim" in row else ""
        lines.append(f"| {row['objective']} | {bits} | {row['energy_distance']:.4f} | {row['kernel_distance']:.4f} |")
    return "\n".join(lines)


def _run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True)


if __name__ == "__main__":
    sys.exit(main())
