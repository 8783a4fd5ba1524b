"""Every objective can be trained, stopped and resumed; what importance sampling has learned is part of the state."""

import json
from pathlib import Path

import pytest
import torch

from tests.harness import (
    assert_same_state,
    checkpoint,
    launch,
    load_config,
    logged,
    overrides,
    tensors_of,
    write_config,
)
from trainer.diffusion.ddpm import objective as objectives
from trainer.diffusion.ddpm import reverse, schedules
from trainer.engine.network.build import build_network
from trainer.errors import ConfigError

IMPORTANCE = overrides(
    diffusion__variance="learned-range",
    diffusion__loss="bound",
    diffusion__timestep_sampling="importance",
    diffusion__timesteps=4,  # so that ten losses of each are soon there
    train__duration="12 steps",
    checkpoint__every="6 steps",
)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "mu", "loss": "bound", "variance": "learned"},
        {"prediction": "mu", "loss": "bound", "variance": "small"},
        {"prediction": "mu", "loss": "mse", "variance": "small"},
        {"prediction": "eps", "loss": "bound", "variance": "learned"},
        {"prediction": "eps", "loss": "bound", "variance": "large"},
        {"prediction": "x0", "loss": "mse", "variance": "large"},
        {"prediction": "v", "loss": "mse", "variance": "large"},
        {"prediction": "eps", "loss": "hybrid", "variance": "learned-range", "schedule": "cosine"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_each_objective_trains_and_samples(tmp_path: Path, dataset: Path, settings: dict[str, str]) -> None:
    config = write_config(tmp_path, dataset)
    chosen = overrides(**{f"diffusion__{name}": value for name, value in settings.items()})
    launch(1, "--config", str(config), *chosen, *overrides(train__duration="3 steps"))
    assert len(logged(tmp_path / "run")) == 3
    outputs = tensors_of(tmp_path / "run", 3)["model/conv_out.weight"].shape[0]
    assert outputs == (6 if "learned" in settings["variance"] else 3)
    launch(1, "--run", str(tmp_path / "run"), "--n", "2", script="sample")


@pytest.fixture(scope="module")
def importance(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Twelve steps of eight images over four timesteps, on two processes, with checkpoints of steps 6 and 12."""
    folder = tmp_path_factory.mktemp("importance")
    launch(2, "--config", str(write_config(folder, dataset)), *IMPORTANCE)
    return folder / "run"


def test_what_it_learned_is_resumed(importance: Path, tmp_path: Path, dataset: Path) -> None:
    halves = write_config(tmp_path, dataset)
    launch(2, "--config", str(halves), *IMPORTANCE, *overrides(train__duration="6 steps"))
    launch(2, "--config", str(halves), *IMPORTANCE)
    assert_same_state(importance, tmp_path / "run", 12)
    assert logged(importance) == logged(tmp_path / "run")
    state = tensors_of(importance, 12)
    assert (state["timesteps/counts"] == 10).all()
    assert (state["timesteps/history"] > 0).all()


def test_all_ranks_learn_from_all_losses(importance: Path, tmp_path: Path, dataset: Path) -> None:
    """One process in two micro-batches sees the same images at the same t as two processes do."""
    launch(1, "--config", str(write_config(tmp_path, dataset)), *IMPORTANCE, *overrides(train__micro_batch=4))
    one, two = tensors_of(tmp_path / "run", 12), tensors_of(importance, 12)
    assert torch.equal(one["timesteps/counts"], two["timesteps/counts"])
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5, msg=name)
    losses, others = logged(tmp_path / "run"), logged(importance)
    assert all(losses[step] == pytest.approx(others[step], rel=1e-4) for step in losses)


def test_it_draws_unevenly_once_it_knows(importance: Path, tmp_path: Path, dataset: Path) -> None:
    uniform = overrides(diffusion__timestep_sampling="uniform")
    launch(2, "--config", str(write_config(tmp_path, dataset)), *IMPORTANCE, *uniform)
    even, learned = logged(tmp_path / "run"), logged(importance)
    assert even[1] == learned[1]  # the same draws as long as nothing is known
    assert even[12] != learned[12]
    assert "timesteps/history" not in tensors_of(tmp_path / "run", 12)


def test_another_objective_does_not_go_on_from_it(importance: Path, tmp_path: Path, dataset: Path) -> None:
    source = checkpoint(importance, 12)
    uniform = overrides(diffusion__timestep_sampling="uniform", diffusion__prediction="x0")
    config = write_config(tmp_path, dataset)
    output = launch(1, "--config", str(config), *IMPORTANCE, *uniform, "--resume", str(source), expect=2)
    assert "diffusion.prediction: eps in the checkpoint, x0 now" in output
    assert "diffusion.timestep_sampling: importance in the checkpoint, uniform now" in output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss=hybrid"], 'diffusion: loss = "hybrid" is for variance = "learned-range"'),
        (["variance=learned"], 'diffusion: loss = "mse" does not teach variance = "learned"'),
        (["schedule=table"], 'diffusion: schedule = "table" and betas go together'),
        (["betas=[0.1]"], 'diffusion: schedule = "table" and betas go together'),
        (["schedule=table", "betas=[0.1, 0.2]"], "diffusion: betas has 2 values, timesteps is 20"),
        (["prediction=score"], "diffusion.prediction = 'score': should be 'eps', 'x0', 'mu' or 'v'"),
    ],
)
def test_what_does_not_go_together_is_refused(config_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_path, *(f"diffusion.{setting}" for setting in settings))
    assert message in str(caught.value)


def test_the_names_are_those_of_the_mathematics(config_path: Path) -> None:
    """The configuration stands below the domain and names its choices once more."""
    fields = type(load_config(config_path).diffusion).model_fields
    for name, literal in (
        ("schedule", schedules.ScheduleName),
        ("prediction", reverse.PredictionKind),
        ("variance", reverse.ReverseVariance),
        ("loss", objectives.Loss),
    ):
        assert fields[name].annotation == literal


def test_a_table_of_betas_trains(tmp_path: Path, dataset: Path) -> None:
    table = overrides(diffusion__schedule="table", diffusion__timesteps=3, diffusion__betas=[0.1, 0.2, 0.9])
    launch(1, "--config", str(write_config(tmp_path, dataset)), *table, *overrides(train__duration="1 steps"))
    identity = json.loads((checkpoint(tmp_path / "run", 1) / "manifest.json").read_text())["identity"]
    assert identity["diffusion.betas"] == [0.1, 0.2, 0.9]
    config = load_config(tmp_path / "run" / "config.toml")
    assert build_network(config).conv_out.out_channels == 3
