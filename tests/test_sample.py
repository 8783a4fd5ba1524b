"""Samples: the same seed gives the same images, whatever draws them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.harness import checkpoint, launch, load_config, overrides, write_config
from trainer.diffusion.reverse import ReverseProcess
from trainer.diffusion.samplers import ancestral, initial_noise, sample
from trainer.engine.build import build_diffusion, build_network
from trainer.engine.checkpoints import read_verified
from trainer.engine.sampling import share_of
from trainer.telemetry.pictures import grid, to_uint8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    grids = overrides(log__samples_every="3 steps", train__ema_decay=0.5)
    launch(2, "--config", str(write_config(folder, dataset)), *grids)
    return folder / "run"


def draw(run: Path, out: Path, processes: int, *arguments: str) -> dict[str, np.ndarray]:
    launch(processes, "--run", str(run), "--out", str(out), "--batch", "2", *arguments, script="sample")
    return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))}


def test_one_two_and_three_processes_draw_the_same(run: Path, tmp_path: Path) -> None:
    drawn = [draw(run, tmp_path / str(n), n, "--n", "7", "--seed", "5") for n in (1, 2, 3)]
    assert sorted(drawn[0]) == [*(f"{number:06d}.png" for number in range(7)), "grid.png"]
    for other in drawn[1:]:
        assert drawn[0].keys() == other.keys()
        assert all((drawn[0][name] == other[name]).all() for name in other)
    other_seed = draw(run, tmp_path / "seed", 1, "--n", "2", "--seed", "6")
    assert (other_seed["000000.png"] != drawn[0]["000000.png"]).any()
    fewer = draw(run, tmp_path / "fewer", 1, "--n", "2", "--seed", "5")
    assert (fewer["000001.png"] == drawn[0]["000001.png"]).all()


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_the_images_are_those_of_the_newest_weights(run: Path, tmp_path: Path, weights: str) -> None:
    drawn = draw(run, tmp_path, 1, "--n", "2", "--weights", weights)
    config = load_config(run / "config.toml")
    tensors, _ = read_verified(checkpoint(run, 6))
    network = build_network(config.model).eval()
    network.load_state_dict({k.removeprefix(f"{weights}/"): v for k, v in tensors.items() if k.startswith(weights)})
    reverse = ReverseProcess(network, build_diffusion(config, torch.device("cpu")), variance="small")
    index = torch.arange(2)
    x0 = sample(ancestral(reverse, initial_noise(index, 0, (3, 8, 8)), index=index, seed=0))
    for number in range(2):
        expected = to_uint8(x0[number]).permute(1, 2, 0).numpy().astype(int)
        # channels-last and contiguous convolutions may round differently
        assert np.abs(drawn[f"{number:06d}.png"].astype(int) - expected).max() <= 1


def test_grids_are_drawn_while_training(run: Path) -> None:
    assert [path.name for path in sorted((run / "samples").glob("*.png"))] == ["step-00000003.png", "step-00000006.png"]
    picture = np.asarray(Image.open(run / "samples" / "step-00000006.png"))
    assert picture.shape[2] == 3
    assert picture.std() > 10


def test_default_folder_and_clear_errors(run: Path, tmp_path: Path) -> None:
    launch(1, "--run", str(run), "--n", "1", script="sample")
    assert (run / "samples" / "step-00000006-ema-seed-0" / "000000.png").exists()
    for arguments, message in (
        (["--run", str(tmp_path)], "holds no config.toml, so it is no run's folder"),
        (["--run", str(run), "--seed", "-1"], "--seed -1: should be at least 0"),
        (["--run", str(run), "--checkpoint", str(tmp_path)], "damaged: manifest.json is missing"),
        (["--run", str(run), "--out", "/proc/nowhere"], "/proc/nowhere"),
    ):
        output = launch(1, *arguments, "--n", "1", script="sample", expect=2)
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert message in line
        assert "Traceback" not in output


def test_every_sample_falls_to_one_rank() -> None:
    for world_size in (1, 2, 3, 7):
        shares = [share_of(10, 3, rank, world_size) for rank in range(world_size)]
        assert sorted(number for share in shares for batch in share for number in batch) == list(range(10))
        assert {(batch.start, batch.stop) for share in shares for batch in share} == {(0, 3), (3, 6), (6, 9), (9, 10)}


def test_pixels_round_trip_and_tiles_lie_in_order() -> None:
    levels = torch.arange(256, dtype=torch.float32)
    assert (to_uint8(levels / 127.5 - 1) == levels).all()
    images = np.stack([np.full((3, 4, 4), 40 * n, dtype=np.uint8) for n in range(5)])
    picture = grid(images, shortest_side=8)
    assert picture.shape == (12, 18, 3)  # two rows of three tiles of 4 + 2 pixels
    assert [int(picture[2, 2 + 6 * column, 0]) for column in range(3)] == [0, 40, 80]
    assert [int(picture[8, 2 + 6 * column, 0]) for column in range(3)] == [120, 160, 255]
