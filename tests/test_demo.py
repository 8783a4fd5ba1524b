"""`make demo`, whole: it ends in a picture, the loss falls, and the samples come nearer to the data."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.format import INDEX_NAME
from tests.harness import REPOSITORY, checkpoint, environment, launch, logged
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.decode import decode


def energy_distance(one: np.ndarray, other: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over flattened images in [0, 1]; unbiased, 0 for equal distributions."""
    x, y = (images.reshape(len(images), -1) / 255 for images in (one, other))

    def mean_distance(a: np.ndarray, b: np.ndarray, pairs: int) -> float:
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        return float(np.sqrt(squared.clip(min=0)).sum() / pairs)

    n, m = len(x), len(y)
    return 2 * mean_distance(x, y, n * m) - mean_distance(x, x, n * (n - 1)) - mean_distance(y, y, m * (m - 1))


def real_digits(folder: Path) -> np.ndarray:
    dataset = ShardedDataset(folder)
    assert (folder / INDEX_NAME).exists()
    return np.stack([decode(dataset.read(sample), 16, "L") for sample in range(len(dataset))])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_learns(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("trainer", "data_prep", "launch", "configs/demo.toml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    done = subprocess.run(
        [sys.executable, "-m", "launch.demo"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "demo"
    assert np.asarray(Image.open(run / "demo.png")).std() > 20
    losses = logged(run)
    assert losses[25] > 0.8
    assert losses[1350] < 0.05

    real = real_digits(tmp_path / "data" / "mnist16")
    distance = {}
    for step in (450, 1350):
        out = tmp_path / f"samples-{step}"
        arguments = ("--run", str(run), "--checkpoint", str(checkpoint(run, step)), "--n", "64", "--out", str(out))
        launch(2, *arguments, script="sample")
        distance[step] = energy_distance(
            np.stack([np.asarray(Image.open(out / f"{number:06d}.png")) for number in range(64)]), real
        )
    print("energy distance to the training images:", distance)
    assert distance[1350] < 0.7 * distance[450]


def test_the_distance_measures() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 16)).astype(np.float64)
    darker = images * 0.7
    assert abs(energy_distance(images[:200], images[200:])) < 0.02
    assert energy_distance(images[:200], darker[200:]) > 0.1
