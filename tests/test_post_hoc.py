"""Averages of any width from snapshots of a few: beside least squares, a known trajectory and a run that tracked it."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma, solve_weights
from safetensors.torch import load_file

from tests.harness import checkpoint, events, launch, load_config, overrides, read_verified, tensors_of, write_config
from tests.stored import flip
from trainer import convert
from trainer.arguments import weights_name
from trainer.engine.checkpointing.checkpoints import read_weights
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.run_folder import RunFolder
from trainer.engine.state.ema import power_function
from trainer.engine.state.post_hoc_ema import combination
from trainer.interop import average as averaging

Floats = npt.NDArray[np.float64]


def profile(t: int, updates: int, sigma_rel: float) -> Floats:
    """(updates,) what the average after t updates weighs each of them by: the product of the decays, by hand."""
    decay = power_function(sigma_rel)
    found = np.zeros(updates)
    for n in range(1, t + 1):
        found *= decay(n)
        found[n - 1] += 1 - decay(n)
    return found


def snapshots_of(updates: int, count: int) -> list[tuple[int, float]]:
    return [(updates * k // count, sigma) for k in range(1, count + 1) for sigma in (0.05, 0.1)]


@pytest.mark.parametrize("sigma_rel", [0.04, 0.075, 0.12, 0.2])
def test_weights_are_those_of_least_squares(sigma_rel: float) -> None:
    """Over 2,000 updates one by one, with a Lagrange multiplier for their sum; and ema-pytorch's, whose sum is free."""
    snapshots = snapshots_of(2000, 20)
    weights, error = combination(snapshots, updates=2000, sigma_rel=sigma_rel)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    profiles = np.stack([profile(t, 2000, sigma) for t, sigma in snapshots], axis=1)
    wanted = profile(2000, 2000, sigma_rel)
    # The sum is eliminated: what is left over from the last snapshot is the others' differences to it.
    differences, rest = profiles[:, :-1] - profiles[:, -1:], wanted - profiles[:, -1]
    free = np.linalg.lstsq(differences, rest, rcond=None)[0]
    expected = np.append(free, 1 - free.sum())
    assert np.abs(weights.numpy() - expected).max() < 1e-4
    left = np.linalg.norm(profiles @ weights.numpy() - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(left, rel=1e-2)
    t, gamma = (torch.tensor(values).double() for values in zip(*((t, sigma_rel_to_gamma(s)) for t, s in snapshots)))
    at, to = torch.tensor([2000.0]), torch.tensor([sigma_rel_to_gamma(sigma_rel)]).double()
    assert (solve_weights(t, gamma, at, to)[:, 0] - weights).abs().max() < 0.05


def test_a_known_trajectory_is_averaged_as_well_as_the_theory_says() -> None:
    """|sum of averages - the average| <= ||sum of profiles - profile|| ||trajectory - any constant||."""
    updates, rng = 1500, np.random.default_rng(0)
    trajectory = 7 + np.cumsum(rng.normal(size=(updates, 4)), axis=0) / updates**0.5
    snapshots = snapshots_of(updates, 24)
    profiles = np.stack([profile(t, updates, sigma) for t, sigma in snapshots], axis=1)
    stored = profiles.T @ trajectory
    for sigma_rel in (0.06, 0.08, 0.12, 0.2):
        weights = combination(snapshots, updates=updates, sigma_rel=sigma_rel)[0].numpy()
        wanted = profile(updates, updates, sigma_rel)
        found, direct = weights @ stored, wanted @ trajectory
        moved = np.linalg.norm(trajectory - trajectory.mean(axis=0), axis=0)
        bound = np.linalg.norm(profiles @ weights - wanted) * moved
        assert (np.abs(found - direct) <= bound * (1 + 1e-9)).all()
        assert (bound < 0.02 * moved).all()
        assert np.abs(found - direct).max() < 5e-3 * np.abs(direct - trajectory[-1]).max()
    tracked = combination(snapshots, updates=updates, sigma_rel=0.1)[0].numpy() @ stored
    assert np.abs(tracked - profile(updates, updates, 0.1) @ trajectory).max() < 1e-9


def test_a_network_that_never_moved_is_its_own_average() -> None:
    for snapshots in ([(3, 0.1)], [(2, 0.05), (5, 0.2)], snapshots_of(40, 4)):
        weights, _ = combination(snapshots, updates=snapshots[-1][0], sigma_rel=0.15)
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)


TRACKED = {
    "train__ema_sigma_rel": "[0.05, 0.12, 0.2]",
    "train__ema_snapshots": "2 steps",
    "train__duration": "16 steps",
    "checkpoint__every": "4 steps",
}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Sixteen updates with three widths and a snapshot of them after every second."""
    folder = tmp_path_factory.mktemp("tracked")
    launch(1, "--config", str(write_config(folder, dataset)), *overrides(**TRACKED))
    return folder / "run"


def assert_snapshots_are_the_checkpoints_averages(run: Path) -> None:
    for step in (4, 8, 12, 16):
        snapshot, manifest = read_verified(run / "averages" / f"step-{step:08d}")
        saved = tensors_of(run, step)
        assert {name.partition("/")[0] for name in snapshot} == {"ema-0.05", "ema-0.12", "ema-0.2"}
        assert snapshot.keys() == {name for name in saved if name.startswith("ema-")}
        assert all(torch.equal(tensor, saved[name]) for name, tensor in snapshot.items())
        assert manifest["state"]["updates"] == step
    assert len(list((run / "averages").glob("step-*"))) == 8


def test_snapshots_hold_the_averages_of_their_step(tracked: Path) -> None:
    assert_snapshots_are_the_checkpoints_averages(tracked)


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("fsdp2", marks=pytest.mark.slow)]
)
def test_snapshots_of_two_ranks_are_whole_too(tmp_path: Path, dataset: Path, strategy: str) -> None:
    config = write_config(tmp_path, dataset)
    launch(2, "--config", str(config), *overrides(**TRACKED, train__strategy=strategy, model__dropout=0.0))
    assert_snapshots_are_the_checkpoints_averages(tmp_path / "run")


def test_the_width_that_was_also_tracked_is_met(tracked: Path) -> None:
    """From the two other widths. The error is small beside what the average has smoothed away."""
    found, step, updates = averaging._open(RunFolder(tracked, writes=False), None, make_accelerator())
    assert (step, updates, len(found)) == (16, 16, 24)
    others = [one for one in found if one.sigma_rel != 0.12]
    weights, error = combination([(one.updates, one.sigma_rel) for one in others], updates=16, sigma_rel=0.12)
    assert error < 0.05
    made = dict(averaging._sums(others, weights))
    direct, raw = (read_weights(checkpoint(tracked, 16), kind)[0] for kind in ("ema-0.12", "model"))
    off = sum((made[name].double() - direct[name].double()).square().sum().item() for name in direct)
    smoothed = sum((raw[name].double() - direct[name].double()).square().sum().item() for name in direct)
    assert off**0.5 < 0.03 * smoothed**0.5


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object, expect: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        assert convert.main() == expect
        printed = capsys.readouterr()
        return printed.err.strip() if expect else printed.out

    return call


def test_an_average_becomes_a_run_to_draw_from(tracked: Path, tmp_path: Path, tell: Any) -> None:
    out = tmp_path / "wide"
    output = tell("average", "--run", tracked, "--sigma-rel", 0.12, "--step", 8, "--out", out)
    assert "at step 8, sigma_rel 0.12, made of 12 stored ones" in output
    direct = read_weights(checkpoint(tracked, 8), "ema-0.12")[0]
    for kind in ("ema", "model"):
        made = read_weights(checkpoint(out, 0), kind)[0]
        assert all((made[name] - direct[name]).abs().max() < 1e-5 for name in direct)  # it is among the stored ones
    assert load_config(out / "config.toml").train.ema_sigma_rel == []
    (event,) = events(out)
    assert (event["event"], event["sigma_rel"], event["step_of_source"]) == ("averaged", 0.12, 8)
    assert "exists already" in tell("average", "--run", tracked, "--sigma-rel", 0.1, "--out", out, expect=2)
    output = launch(1, "--run", str(out), "--n", "2", "--batch", "2", script="sample")
    assert "2 images from" in output


def test_a_damaged_snapshot_is_left_out(tracked: Path, tmp_path: Path, tell: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(tracked, run)
    flip(run / "averages" / "step-00000016" / "part-00000-of-00001.safetensors")
    output = tell("average", "--run", run, "--sigma-rel", 0.1, "--out", tmp_path / "out")
    assert "step-00000016: damaged: part-00000-of-00001.safetensors differs" in output
    assert "at step 14" in output
    line = tell("average", "--run", run, "--sigma-rel", 0.1, "--step", 16, "--out", tmp_path / "other", expect=2)
    assert "has no such snapshot, but 2, 4, 6, 8, 10, 12, 14" in line
    shutil.rmtree(run / "averages")
    line = tell("average", "--run", run, "--sigma-rel", 0.1, "--out", tmp_path / "other", expect=2)
    assert line.startswith("error: ")
    assert "holds no snapshot that is whole; train.ema_snapshots makes them" in line


def test_a_run_that_is_taken_back_makes_its_snapshots_again(tracked: Path, tmp_path: Path, dataset: Path) -> None:
    """Snapshots of lost work lie where those of the work that is done again belong."""
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    shutil.copytree(tracked, run)
    launch(1, "--config", str(config), *overrides(**TRACKED), "--resume", str(checkpoint(run, 12)))
    assert_snapshots_are_the_checkpoints_averages(run)
    assert sorted(path.name for path in (run / "averages" / "superseded").iterdir()) == [
        "step-00000014",
        "step-00000016",
    ]


def test_weights_are_chosen_by_the_average_s_width(tracked: Path, tmp_path: Path, tell: Any) -> None:
    names = [weights_name(text) for text in ("ema", "model", "ema-0.1", "ema-0.10")]
    assert names == ["ema", "model", "ema-0.1", "ema-0.1"]
    tell("export", "--run", tracked, "--weights", "ema-0.120", "--out", tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "unet" / "diffusion_pytorch_model.safetensors")
    direct = read_weights(checkpoint(tracked, 16), "ema-0.12")[0]
    assert torch.equal(exported["conv_in.weight"], direct["conv_in.weight"])
    assert "sigma_rel 0.12" in (tmp_path / "exported" / "README.md").read_text()
    tell("import", tracked, "--weights", "ema-0.2", "--out", tmp_path / "imported")
    assert torch.equal(
        tensors_of(tmp_path / "imported", 0)["ema/conv_in.weight"], tensors_of(tracked, 16)["ema-0.2/conv_in.weight"]
    )
    line = tell("export", "--run", tracked, "--weights", "ema-0.3", "--out", tmp_path / "other", expect=2)
    assert "has no weights 'ema-0.3', but ema, ema-0.05, ema-0.12, ema-0.2, model" in line


@pytest.mark.parametrize("text", ["average", "ema-", "ema-x", "ema-2", "0.1", "ema-nan"])
def test_other_names_of_weights_are_refused(text: str, tell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tell("export", "--run", "r", "--out", "o", "--weights", text)
    assert "should be ema, model, or an average of train.ema_sigma_rel, written ema-0.1" in capsys.readouterr().err
