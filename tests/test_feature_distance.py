"""The distance by features while training: by hand, on any number of ranks, within its time, and what is kept by it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.harness import checkpoint, launch, load_config, logged, overrides, write_config
from tests.test_metrics import tensorboard_steps
from trainer.data.orders.order import sample_ids
from trainer.data.training_data import open_training_data
from trainer.features.kernel_distance import squared_mmd
from trainer.features.networks import EfficientNetLite0, extract

DISTANCE = "validation/feature_distance"
COUNT = f"{DISTANCE}_samples"
MEASURED = {
    "log__distance_every": "16 images",
    "log__distance_samples": 8,
    "log__distance_steps": 3,
    "train__duration": "4 steps",
    "model__dropout": 0.0,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    settings = {**MEASURED, "data__holdout": 0.5, "log__validate_every": "2 steps"}
    said = launch(1, "--config", str(write_config(folder, dataset)), *overrides(**settings))
    assert "step 4: kernel distance of EfficientNet-Lite0 features " in said
    return folder / "run"


def test_it_is_the_distance_of_what_sample_draws_to_held_out_images(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    how = ("--n", "8", "--sampler", "ddim", "--respacing", "3", "--seed", "3", "--batch", "32", "--out", str(out))
    launch(1, "--run", str(measured), "--checkpoint", str(checkpoint(measured, 4)), *how, script="sample")
    drawn = np.stack([np.asarray(Image.open(out / f"{number:06d}.png")) for number in range(8)])
    data = open_training_data(load_config(measured / "config.toml"), index_folder=None)
    ids = data.held_out[sample_ids(np.arange(8), len(data.held_out), seed=0)]  # of more than 8 always the same
    assert len(set(ids.tolist())) == 8
    network = EfficientNetLite0(torch.device("cpu"))

    def features(images: np.ndarray) -> torch.Tensor:
        return extract(network, torch.from_numpy(images).permute(0, 3, 1, 2))["features"]

    real = np.empty((8, 8, 8, 3), np.uint8)
    for pixels, sample in zip(real, ids.tolist(), strict=True):
        data.dataset.decode_into(pixels, sample)
    found = logged(measured, DISTANCE)
    assert list(found) == [2, 4]
    assert found[4] == pytest.approx(squared_mmd(features(drawn), features(real)), rel=1e-3)
    assert logged(measured, COUNT) == {2: 8.0, 4: 8.0}
    assert tensorboard_steps(measured / "logs", DISTANCE) == [2, 4]
    assert list(logged(measured, "validation/ema_loss")) == [2, 4]


@pytest.mark.slow
def test_two_ranks_have_the_number_of_one(measured: Path, tmp_path: Path, dataset: Path) -> None:
    settings = {**MEASURED, "data__holdout": 0.5}
    launch(2, "--config", str(write_config(tmp_path, dataset)), *overrides(**settings))
    assert logged(tmp_path / "run", DISTANCE) == pytest.approx(logged(measured, DISTANCE), rel=1e-3)


@pytest.mark.slow
def test_its_time_is_bounded_and_the_best_checkpoint_stays(tmp_path: Path, dataset: Path) -> None:
    """In no time at all each rank draws one batch; the learning rate explodes, so that the first step is the best."""
    settings = MEASURED | {
        "log__distance_samples": 70,
        "log__distance_steps": 2,
        "log__distance_seconds": "0.001 seconds",
        "checkpoint__keep": 1,
        "checkpoint__keep_best": 1,
        "checkpoint__best_metric": DISTANCE,
        "optimizer__learning_rate": 10.0,
        "train__ema_decay": 0.0,
    }
    launch(2, "--config", str(write_config(tmp_path, dataset)), *overrides(**settings))
    assert set(logged(tmp_path / "run", COUNT).values()) == {64.0}  # two ranks, 32 each
    scores = {step: score for step, score in logged(tmp_path / "run", DISTANCE).items() if math.isfinite(score)}
    best = min(scores, key=lambda step: scores[step])
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert kept == {f"step-{best:08d}", "step-00000004"}


def test_what_is_kept_by_it_must_be_scored_by_it(tmp_path: Path, dataset: Path) -> None:
    config = str(write_config(tmp_path, dataset))
    keep = {"checkpoint__keep_best": 1, "checkpoint__best_metric": DISTANCE}
    output = launch(1, "--config", config, *overrides(**keep), expect=2)
    assert "checkpoint.keep_best = 1: needs a score for each checkpoint; set log.distance_every" in output
    output = launch(1, "--config", config, *overrides(**keep, log__distance_every="3 steps"), expect=2)
    assert 'should be a multiple of log.distance_every = "3 steps"' in output
