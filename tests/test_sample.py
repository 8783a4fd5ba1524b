"""Samples: the same seed gives the same images, whatever draws them."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from tests.faults import Fault
from tests.harness import checkpoint, launch, load_config, overrides, read_verified, write_config
from trainer.data.images import to_uint8
from trainer.diffusion.contract import Sampler
from trainer.diffusion.ddpm.process import GaussianDiffusion, Variance
from trainer.diffusion.ddpm.respacing import kept_timesteps
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.ddpm.schedules import ScheduleName, make_betas
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.drawing import outputs
from trainer.drawing.work import Work
from trainer.engine.build import build_objective
from trainer.engine.network.build import build_network
from trainer.engine.processes.collectives import make_accelerator
from trainer.sampling.ancestral import ancestral
from trainer.sampling.ddim import ddim
from trainer.sampling.request import SamplingRequest, batches_of
from trainer.sampling.steps import last_of
from trainer.telemetry.pictures import grid

T = 20


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


def reverse_process(run: Path, weights: str = "ema") -> ReverseProcess:
    """Of the last checkpoint, without any of the program's own ways to it."""
    config = load_config(run / "config.toml")
    tensors, _ = read_verified(checkpoint(run, 6))
    network = build_network(config).eval()
    network.load_state_dict({k.removeprefix(f"{weights}/"): v for k, v in tensors.items() if k.startswith(weights)})
    return build_objective(config, torch.device("cpu")).denoiser(network)


@pytest.mark.parametrize(
    ("arguments", "weights", "steps", "variance", "chain"),
    [
        ([], "ema", "all", "small", ancestral),
        (["--weights", "model"], "model", "all", "small", ancestral),
        (["--variance", "large", "--respacing", "10"], "ema", "10", "large", ancestral),
        (["--sampler", "ddim", "--respacing", "ddim5"], "ema", "ddim5", "small", ddim),
        (["--sampler", "ddim", "--option", "eta=0.5"], "ema", "all", "small", partial(ddim, eta=0.5)),
        (["--sampler", "ddpm-sigma-hat"], "ema", "all", "small", partial(ddim, eta=1.0, sigma_hat=True)),
    ],
)
def test_the_images_are_what_the_mathematics_draws(
    run: Path, tmp_path: Path, arguments: list[str], weights: str, steps: str, variance: Variance, chain: Sampler
) -> None:
    drawn = draw(run, tmp_path, 1, "--n", "2", *arguments)
    reverse = reverse_process(run, weights)
    reverse.variance = variance
    reverse = reverse.respaced(kept_timesteps(T, steps))
    noise = KeyedNoise.sampling(0, torch.arange(2))
    x0 = last_of(chain(reverse, noise.normal("initial", (3, 8, 8)), noise=noise))
    for number in range(2):
        expected = to_uint8(x0[number]).permute(1, 2, 0).numpy().astype(int)
        # channels-last and contiguous convolutions may round differently
        assert np.abs(drawn[f"{number:06d}.png"].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_is_of_second_order_where_ddim_is_of_first(schedule: ScheduleName) -> None:
    """On normal data the network and the ODE's solution are known in closed form."""
    diffusion = GaussianDiffusion(make_betas(schedule, 1000))
    mean, spread = 0.2, 0.2

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = diffusion.abar[t][:, None, None, None]
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * spread**2 + 1 - abar)

    reverse = ReverseProcess(network, diffusion, variance="small")
    noise = KeyedNoise.sampling(0, torch.arange(64))
    x = noise.normal("initial", (1, 4, 4))
    abar = diffusion.abar[-1]
    solution = mean + spread * (x - abar.sqrt() * mean) / (abar * spread**2 + 1 - abar).sqrt()

    def error(name: str, steps: str) -> float:
        request = SamplingRequest(sampler=name, count=64, seed=0, batch=64)
        drawn = last_of(request.chain(reverse.respaced(kept_timesteps(1000, steps)), x, noise))
        return (drawn - solution).abs().mean().item()

    assert error("dpm-solver++", "200") / error("dpm-solver++", "1000") > 10
    assert 3 < error("ddim", "200") / error("ddim", "1000") < 6
    assert error("dpm-solver++", "1000") < 3e-4
    assert error("dpm-solver++", "5") < 0.2  # no division by a last alpha of zero


@pytest.mark.parametrize("output", ["npz", "tar", "folder"])
def test_a_killed_draw_goes_on_and_all_formats_hold_the_same(run: Path, tmp_path: Path, output: str) -> None:
    expected = draw(run, tmp_path / "folder", 1, "--n", "7", "--seed", "5")
    out = tmp_path / "drawn"
    arguments = ["--run", str(run), "--out", str(out), "--batch", "2", "--n", "7", "--seed", "5", "--format", output]
    point, call = ("save_png", 3) if output == "folder" else ("work_part", 2)
    launch(2, *arguments, script="sample", fault=Fault(action="kill", point=point, call=call, rank=0), expect=None)
    whole = [*out.glob("parts/*.npz"), *out.glob("00000[01].png")]  # of the first batch; others may be in pieces
    partly = {path: path.stat().st_mtime_ns for path in whole}
    assert partly
    launch(3, *arguments, script="sample")
    assert all(path.stat().st_mtime_ns == made for path, made in partly.items() if path.exists())
    images = {"npz": read_npz, "tar": read_tar, "folder": read_folder}[output](out)
    assert (images == np.stack([expected[f"{number:06d}.png"] for number in range(7)])).all()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "grid.png"}
    launch(1, *arguments, script="sample")  # finished already
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (out / "parts").exists()
    output_of_other = launch(1, *arguments, "--seed", "6", script="sample", expect=2)
    assert "holds what another request made (seed: 5 there, 6 now)" in output_of_other


def read_npz(out: Path) -> np.ndarray:
    with np.load(out / "samples.npz", allow_pickle=False) as stored:
        assert stored.files == ["arr_0"]
        return stored["arr_0"]


def read_tar(out: Path) -> np.ndarray:
    samples = list(wds.WebDataset(str(out / "samples-000000.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(7)]
    return np.stack([sample["png"] for sample in samples])


def read_folder(out: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(out / f"{number:06d}.png")) for number in range(7)])


def test_shards_of_samples_are_cut_as_they_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three to a shard, drawn in batches of two."""
    monkeypatch.setattr(outputs, "SHARD_SAMPLES", 3)
    work = Work(tmp_path / "out", {}, make_accelerator())
    output = outputs.TarOutput(work)
    batches = batches_of(7, 2)
    images = np.arange(7 * 3 * 4 * 4, dtype=np.uint8).reshape(7, 3, 4, 4)
    for numbers in reversed(output.missing(batches)):
        output.write(numbers, images[numbers.start : numbers.stop])
    output.finish(batches)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    read = [list(wds.WebDataset(str(shard), shardshuffle=False).decode("rgb8")) for shard in shards]
    assert [len(samples) for samples in read] == [3, 3, 1]
    pixels = np.stack([sample["png"] for samples in read for sample in samples])
    assert (pixels == images.transpose(0, 2, 3, 1)).all()


def test_grids_are_drawn_while_training(run: Path) -> None:
    assert [path.name for path in sorted((run / "samples").glob("*.png"))] == ["step-00000003.png", "step-00000006.png"]
    picture = np.asarray(Image.open(run / "samples" / "step-00000006.png"))
    assert picture.shape[2] == 3
    assert picture.std() > 10


def test_a_grid_is_what_sample_draws(run: Path, tmp_path: Path) -> None:
    """By default too: ancestral, all steps, the run's seed; its two ranks drew two each."""
    drawn = draw(run, tmp_path, 1, "--n", "4", "--seed", "3", "--checkpoint", str(checkpoint(run, 6)))
    images = np.stack([drawn[f"{number:06d}.png"] for number in range(4)])
    picture = np.asarray(Image.open(run / "samples" / "step-00000006.png"))
    assert np.array_equal(picture, grid(images.transpose(0, 3, 1, 2)))


def test_default_folder_and_clear_errors(run: Path, tmp_path: Path) -> None:
    launch(1, "--run", str(run), "--n", "1", script="sample")
    assert (run / "samples" / "step-00000006-ema-seed-0" / "000000.png").exists()
    for arguments, message in (
        (["--run", str(tmp_path)], "holds no config.toml, so it is no run's folder"),
        (["--run", str(run), "--seed", "-1"], "--seed -1: should be at least 0"),
        (["--run", str(run), "--respacing", "ten"], "--respacing: "),
        (["--run", str(run), "--eta", "0"], "--eta 0.0: goes with sampler ddim, not ddpm"),
        (["--run", str(run), "--sampler", "ddim", "--option", "eta=2"], "--option eta=2: should be from 0 to 1"),
        (["--run", str(run), "--sampler", "ddim", "--option", "etta=1"], "--option etta=1: unknown; did you mean eta?"),
        (["--run", str(run), "--checkpoint", str(tmp_path)], "damaged: manifest.json is missing"),
        (["--run", str(run), "--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--run", str(run), "--out", str(run)], "holds other files; choose a new or empty folder"),
    ):
        output = launch(1, *arguments, "--n", "1", script="sample", expect=2)
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert message in line
        assert "Traceback" not in output


def test_pixels_round_trip_and_tiles_lie_in_order() -> None:
    levels = torch.arange(256, dtype=torch.float32)
    assert (to_uint8(levels / 127.5 - 1) == levels).all()
    images = np.stack([np.full((3, 4, 4), 40 * n, dtype=np.uint8) for n in range(5)])
    picture = grid(images, shortest_side=8)
    assert picture.shape == (12, 18, 3)  # two rows of three tiles of 4 + 2 pixels
    assert [int(picture[2, 2 + 6 * column, 0]) for column in range(3)] == [0, 40, 80]
    assert [int(picture[8, 2 + 6 * column, 0]) for column in range(3)] == [120, 160, 255]
