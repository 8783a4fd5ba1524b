"""Bits per dimension and the paper's figures of a trained run: the same on any number of processes, killed or not."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.faults import Fault
from tests.harness import launch, load_config, overrides, write_config
from trainer.diffusion.ddpm.likelihood import bits_per_dim
from trainer.drawing.trained import TrainedRequest, open_trained
from trainer.evaluation.images import open_images
from trainer.sampling.request import ReverseRequest

T = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    launch(1, "--config", str(write_config(folder, dataset)), *overrides(train__ema_decay=0.5))
    return folder / "run"


def evaluate(run: Path, command: str, *arguments: str, processes: int = 1, **options: object) -> str:
    return launch(processes, command, "--run", str(run), *arguments, script="evaluate", **options)


def bound(run: Path, out: Path, *arguments: str, processes: int = 1) -> dict[str, float]:
    evaluate(run, "bpd", "--out", str(out), "--batch", "4", *arguments, processes=processes)
    return json.loads((out / "bpd.json").read_text())


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bound of all 21 images, in one go on one process."""
    out = tmp_path_factory.mktemp("bound") / "whole"
    bound(run, out)
    return out


def test_the_bound_is_the_sum_of_its_terms(whole: Path) -> None:
    report = json.loads((whole / "bpd.json").read_text())
    with (whole / "terms.csv").open() as stream:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    assert [row["t"] for row in rows] == list(range(T))
    terms = sum(row["bits_per_dim"] for row in rows)
    assert report["bits_per_dim"] == pytest.approx(report["prior_bits_per_dim"] + terms)
    assert report["bits_per_dim"] == pytest.approx(report["rate_bits_per_dim"] + report["distortion_bits_per_dim"])
    assert rows[0]["rate_bits_per_dim"] == pytest.approx(report["rate_bits_per_dim"])
    assert rows[-1]["rate_bits_per_dim"] == pytest.approx(report["prior_bits_per_dim"])
    assert rows[3]["rate_bits_per_dim"] - rows[4]["rate_bits_per_dim"] == pytest.approx(rows[4]["bits_per_dim"])
    assert rows[0]["distortion_rmse_255"] == pytest.approx(127.5 * rows[0]["x0_mse"] ** 0.5)
    assert report["images"] == 21
    assert Image.open(whole / "curves.png").width > 1000
    assert list(whole.glob("events.out.tfevents.*"))


def test_it_is_the_mathematics_of_the_averaged_weights(run: Path, whole: Path) -> None:
    request = TrainedRequest(run=run, checkpoint=None, weights="ema")
    trained = open_trained(request, ReverseRequest())
    images = open_images(trained.config, None, held_out=False, count=None)
    numbers = range(21)
    assert sorted(images.ids(numbers)) == list(numbers)
    direct = bits_per_dim(trained.denoiser, images.load(numbers), torch.tensor(images.ids(numbers)), 0)
    report = json.loads((whole / "bpd.json").read_text())
    assert report["bits_per_dim"] == pytest.approx(direct.total.mean().item(), rel=1e-5)
    assert report["standard_error"] == pytest.approx(direct.total.std().item() / 21**0.5, rel=1e-4)


def test_two_processes_and_a_killed_one_find_the_same(run: Path, whole: Path, tmp_path: Path) -> None:
    expected = json.loads((whole / "bpd.json").read_text())
    checkpoint = expected.pop("checkpoint"), expected.pop("weights")

    def numbers(out: Path, processes: int) -> dict[str, float]:
        report = bound(run, out, processes=processes)
        assert (report.pop("checkpoint"), report.pop("weights")) == checkpoint
        return report

    assert numbers(tmp_path / "two", 2) == pytest.approx(expected, rel=1e-6)
    killed = Fault(action="kill", point="work_part", call=3, rank=0)
    out = tmp_path / "killed"
    evaluate(run, "bpd", "--out", str(out), "--batch", "4", processes=2, fault=killed, expect=None)
    assert not (out / "bpd.json").exists()
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.npz")}
    assert 2 <= len(parts) < 6
    assert numbers(out, 3) == pytest.approx(expected, rel=1e-6)
    assert all(path.stat().st_mtime_ns == written for path, written in parts.items())  # not done again


@pytest.mark.slow
def test_options_change_what_they_say(run: Path, whole: Path, tmp_path: Path) -> None:
    full = json.loads((whole / "bpd.json").read_text())
    few = bound(run, tmp_path / "few", "--images", "5")
    assert few["images"] == 5
    respaced = bound(run, tmp_path / "respaced", "--respacing", "5", "--variance", "large")
    with (tmp_path / "respaced" / "terms.csv").open() as stream:
        assert [int(row["t"]) for row in csv.DictReader(stream)] == [0, 5, 10, 14, 19]
    tanh = bound(run, tmp_path / "tanh", "--decoder", "tanh")
    raw = bound(run, tmp_path / "raw", "--weights", "model")
    seed = bound(run, tmp_path / "seed", "--seed", "1")
    values = [full, few, respaced, tanh, raw, seed]
    assert len({value["bits_per_dim"] for value in values}) == len(values)
    assert tanh["rate_bits_per_dim"] == full["rate_bits_per_dim"]
    output = evaluate(run, "bpd", "--out", str(tmp_path / "few"), "--batch", "4", "--images", "6", expect=2)
    assert "holds what another request made (images: 5 there, 6 now); choose another folder" in output


def test_held_out_images_are_judged_apart(tmp_path: Path, dataset: Path) -> None:
    split = overrides(data__holdout=0.4, train__duration="1 steps")
    launch(1, "--config", str(write_config(tmp_path, dataset)), *split)
    config = load_config(tmp_path / "run" / "config.toml")
    held_out = open_images(config, None, held_out=True, count=None)
    others = open_images(config, None, held_out=False, count=None)
    ids = [set(images.ids(range(images.count))) for images in (held_out, others)]
    assert ids[0] | ids[1] == set(range(21))
    assert not ids[0] & ids[1]
    report = bound(tmp_path / "run", tmp_path / "bound", "--held-out")
    assert report["images"] == held_out.count > 0


@pytest.mark.parametrize("processes", [1, 2])
def test_progressive_generation_ends_in_the_sample(run: Path, tmp_path: Path, processes: int) -> None:
    out = tmp_path / "progressive.png"
    evaluate(run, "progressive", "--rows", "3", "--every", "5", "--out", str(out), processes=processes)
    notes = json.loads(out.with_suffix(".json").read_text())
    assert [row["sample"] for row in notes["rows"]] == [0, 1, 2]
    assert notes["rows"][0]["estimated_at_t"] == [19, 15, 10, 5, 0]
    tiles = tiles_of(out, rows=3, columns=5)
    launch(1, "--run", str(run), "--n", "3", "--out", str(tmp_path / "drawn"), script="sample")
    for number in range(3):
        drawn = np.asarray(Image.open(tmp_path / "drawn" / f"{number:06d}.png")).astype(int)
        assert np.abs(tiles[number][-1].astype(int) - drawn).max() <= 1  # one and three at a time round differently


def test_samples_that_share_a_latent_go_separate_ways_from_there(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared.png"
    arguments = ("--rows", "2", "--splits", "20", "10", "1", "--variants", "3")
    evaluate(run, "shared-latents", *arguments, "--out", str(out), processes=2)
    for row in tiles_of(out, rows=2, columns=9):
        spread = [np.std([tile.astype(float) for tile in row[3 * k : 3 * k + 3]], axis=0).mean() for k in range(3)]
        assert spread[2] == 0  # x_1 has one step left, which is without noise
        assert spread[0] > spread[1] > 0
    refused = evaluate(run, "shared-latents", "--splits", "21", expect=2)
    assert "--splits 21: should be 1 to 20, the steps of the process" in refused


def test_interpolation_mixes_pixels_at_0_and_nothing_of_them_at_t_max(run: Path, tmp_path: Path, dataset: Path) -> None:
    files = sorted((dataset.parent / "images").glob("*.png"))[:4]
    out = tmp_path / "mixed.png"
    arguments = ("--timesteps", "0", "20", "--mixtures", "3", "--out", str(out))
    evaluate(run, "interpolate", "--files", *map(str, files), *arguments, processes=2)
    rows = tiles_of(out, rows=4, columns=5)
    one, other = (np.asarray(Image.open(path)).astype(float) for path in files[:2])
    assert (rows[0][0] == one).all()
    assert (rows[0][-1] == other).all()
    for k, tile in enumerate(rows[0][1:-1], start=1):
        assert np.abs(tile - (1 - k / 4) * one - k / 4 * other).max() <= 0.51
    middle, quarter = (rows[1][k].astype(float) for k in (2, 1))
    assert np.abs(middle - one).mean() > 20  # of 255: nothing is left
    assert np.abs(middle - quarter).mean() < np.abs(middle - one).mean()
    refused = evaluate(run, "interpolate", "--files", str(files[0]), expect=2)
    assert "takes images in pairs, got 1" in refused


def test_reconstruction_comes_back_to_the_image(tmp_path: Path, dataset: Path) -> None:
    """A network that has learned nothing predicts (almost) no noise, and the way to the latent and back is exact."""
    nothing = overrides(train__duration="1 steps", optimizer__learning_rate=1e-12)
    nothing += overrides(diffusion__schedule="table", diffusion__betas=[0.1] * T)  # abar_T = 0.12, not nearly 0
    launch(1, "--config", str(write_config(tmp_path, dataset)), *nothing)
    files = sorted((dataset.parent / "images").glob("*.png"))[:3]
    out = tmp_path / "reconstructed.png"
    evaluate(tmp_path / "run", "reconstruct", "--files", *map(str, files), "--out", str(out), processes=2)
    notes = json.loads(out.with_suffix(".json").read_text())
    assert [row["image"] for row in notes["rows"]] == [0, 1, 2]
    for row, (image, latent, again), path in zip(notes["rows"], tiles_of(out, rows=3, columns=3), files, strict=True):
        assert (image == np.asarray(Image.open(path))).all()
        assert row["mse"] < 1e-6
        assert np.abs(again.astype(int) - image).max() <= 1
        assert latent.std() < 0.2 * image.std()  # sqrt(abar_T) of it, shown at a third


def test_bad_requests_are_one_line(run: Path, tmp_path: Path, dataset: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(deep)
    text = tmp_path / "text.png"
    text.write_text("no image")
    other = tmp_path / "shards"
    shutil.copytree(dataset, other)
    (other / "index.npy").unlink()
    for command, arguments, message in (
        ("bpd", ["--images", "22"], "--images 22: there are 21 in"),
        ("bpd", ["--held-out"], "--held-out: the run has data.holdout = 0"),
        ("bpd", ["--held-out", "--data", str(dataset)], "--held-out: goes with the run's own images, not with --data"),
        ("reconstruct", ["--files", str(deep)], "deep.png: has more than 8 bits a channel (I;16)"),
        ("progressive", ["--out", str(tmp_path / "figure.json")], "figure.json: should end in .png"),
        ("bpd", ["--data", str(other)], "index.npy: missing"),
        ("bpd", ["--respacing", "21"], "--respacing:"),
        ("bpd", ["--seed", "-1"], "--seed -1: should be at least 0"),
        ("interpolate", ["--files", str(text), str(text)], "text.png: not an image that can be read"),
        ("interpolate", ["--timesteps", "21"], "--timesteps 21: should be 0 to 20"),
    ):
        output = evaluate(run, command, *arguments, expect=2)
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert message in line
        assert "Traceback" not in output


def tiles_of(path: Path, *, rows: int, columns: int) -> list[list[np.ndarray]]:
    """The 8 x 8 images on a picture that `tile` made."""
    picture = np.asarray(Image.open(path))
    side = picture.shape[0] // rows
    assert picture.shape[:2] == (rows * side, columns * side)
    inside = slice(1, -1, (side - 2) // 8)
    return [[tile[inside, inside] for tile in np.split(row, columns, axis=1)] for row in np.split(picture, rows)]
