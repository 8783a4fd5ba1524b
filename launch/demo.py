"""A complete small example on real images: shards, two-process training, samples, a picture. Run by `make demo`."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

from trainer.config import Config
from trainer.telemetry.metrics import read_metrics

mpl.use("Agg")
from matplotlib import pyplot as plt

_CONFIG = Path("configs/demo.toml")
_ACCELERATE = (
    "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--log_dir /dev/null"
)


def main() -> int:
    """Run the four commands as a user would type them, then print suggestions for further steps."""
    config = Config.load(_CONFIG)
    run, samples = Path(config.run_dir), Path(config.run_dir) / "samples" / "final"
    started = time.perf_counter()
    commands = (
        f"python -m data_prep embedded:mnist5k {config.data.path} --size {config.model.image_size}",
        f"{_ACCELERATE} trainer/train.py --config {_CONFIG}",
        f"{_ACCELERATE} trainer/sample.py --run {run} --n 64 --out {samples}",
    )
    for command in commands:
        print(f"\n$ {command}", flush=True)
        status = subprocess.run(_in_this_environment(command)).returncode
        if status != 0:
            print(f"error: the command above ended with status {status}", file=sys.stderr)
            return status
    picture = draw_summary(run, samples)
    losses = [record["train/loss"] for record in read_metrics(run / "logs") if "train/loss" in record]
    minutes = (time.perf_counter() - started) / 60
    print(f"""
Done in {minutes:.1f} minutes: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}.
  the picture        {picture}
  single images      {samples}/
  the run            {run}/ (config.toml, checkpoints/, logs/, samples/, events.jsonl)

Try next, with {Path(sys.executable).parent} on your PATH (the third goes on from here):
  tensorboard --logdir {run}/logs
  python trainer/sample.py --run {run} --n 64 --seed 1
  accelerate launch --num_processes 1 trainer/train.py --config {_CONFIG} --set train.duration="3000 steps"
  python trainer/train.py --config configs/lsun256.toml --dry-run --world-size 8
  python trainer/report.py {run}""")
    return 0


def draw_summary(run: Path, samples: Path) -> Path:
    """Draw the loss over images seen, the grids drawn in training and the final samples; returns RUN/demo.png."""
    records = [record for record in read_metrics(run / "logs") if "train/loss" in record]
    grids = sorted((run / "samples").glob("step-*.png"))
    figure, axes = plt.subplot_mosaic(
        [["loss"] * len(grids), [f"grid{i}" for i in range(len(grids))]] if grids else [["loss"]],
        figsize=(6, 6),
        height_ratios=[2, 1.6] if grids else [1],
    )
    axes["loss"].plot([r["step"] for r in records], [r["train/loss"] for r in records])
    axes["loss"].set(xlabel="step", ylabel="training loss", yscale="log", title="L_simple")
    for place, path in enumerate(grids):
        axis = axes[f"grid{place}"]
        axis.imshow(np.asarray(Image.open(path)))
        axis.set_title(f"step {int(path.stem.removeprefix('step-'))}", fontsize=10)
        axis.axis("off")
    figure.tight_layout()
    figure.canvas.draw()
    curves = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]
    final = (
        Image.open(samples / "grid.png").convert("RGB").resize((curves.height, curves.height), Image.Resampling.NEAREST)
    )
    picture = Image.new("RGB", (curves.width + final.width, curves.height), "white")
    picture.paste(curves, (0, 0))
    picture.paste(final, (curves.width, 0))
    path = run / "demo.png"
    picture.save(path)
    return path


def _in_this_environment(command: str) -> list[str]:
    """The command with this interpreter's executables, whatever PATH is."""
    program, *rest = shlex.split(command)
    module = {"python": [], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}[program]
    return [sys.executable, *module, *rest]


if __name__ == "__main__":
    sys.exit(main())
