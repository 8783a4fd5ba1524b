"""The loss on held-out images: by hand, on any number of ranks, under any strategy, through a restart."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness import checkpoint, events, launch, load_config, logged, overrides, write_config
from tests.test_metrics import tensorboard_steps
from trainer.data.training_data import open_training_data
from trainer.diffusion.ddpm.family import ddpm_objective
from trainer.diffusion.keyed_noise import Stream, keyed_bits, keyed_normal
from trainer.engine.build import build_trained
from trainer.engine.checkpointing.checkpoints import read_weights
from trainer.telemetry.metrics import read_metrics

VALIDATED = {
    "data__holdout": 0.5,
    "log__validate_every": "2 steps",
    "log__every": "2 steps",
    "model__dropout": 0.0,
}


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Six steps on one rank, validated and saved after every second."""
    folder = tmp_path_factory.mktemp("validated")
    config = str(write_config(folder, dataset))
    output = launch(1, "--config", config, *overrides(**VALIDATED))
    (line,) = [line for line in output.splitlines() if line.startswith("step 4: on ")]
    assert line.endswith(" s")  # how long it took
    return folder / "run"


def by_hand(run: Path, step: int, kind: str) -> dict[str, float]:
    """One image at a time, of the run's configuration; L_simple of Ho et al. 2020, equation 14."""
    config = load_config(run / "config.toml")
    data = open_training_data(config, index_folder=None)
    device = torch.device("cpu")
    diffusion = ddpm_objective(config.diffusion, device).diffusion
    network = build_trained(config, read_weights(checkpoint(run, step), kind)[0], device)
    losses: dict[int, list[float]] = {}
    for sample in data.held_out.tolist():
        index = torch.tensor([sample])
        pixels = np.empty((8, 8, 3), dtype=np.uint8)
        data.dataset.decode_into(pixels, sample)
        x0 = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        t = keyed_bits(config.seed, Stream.VALIDATION, index, 1)[:, 0] * 20 // 2**32
        eps = keyed_normal(config.seed, Stream.VALIDATION, index, (3, 8, 8), sub=1)
        abar = diffusion.abar64[t].float()
        predicted = network(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t)
        losses.setdefault(int(t) // 5, []).append((predicted - eps).square().mean().item())
    everything = [loss for some in losses.values() for loss in some]
    assert len(everything) >= 5
    means = {"": sum(everything) / len(everything)}
    return means | {f"_q{quarter + 1}": sum(some) / len(some) for quarter, some in losses.items()}


@pytest.mark.parametrize(("kind", "name"), [("model", "loss"), ("ema", "ema_loss")])
def test_the_loss_is_the_one_by_hand(validated: Path, kind: str, name: str) -> None:
    for step in (2, 6):
        for suffix, value in by_hand(validated, step, kind).items():
            assert logged(validated, f"validation/{name}{suffix}")[step] == pytest.approx(value, rel=1e-5)
    assert logged(validated, "validation/loss") != logged(validated, "validation/ema_loss")
    assert list(logged(validated, "validation/ema_loss")) == [2, 4, 6]
    assert tensorboard_steps(validated / "logs", "validation/ema_loss") == [2, 4, 6]
    assert [record["step"] for record in read_metrics(validated / "logs")] == [2, 4, 6]  # beside the step's other ones


def same_numbers(validated: Path, config: Path, ranks: int, **settings: object) -> None:
    launch(ranks, "--config", str(config), *overrides(**VALIDATED, **settings))
    names = {name for record in read_metrics(validated / "logs") for name in record if name.startswith("validation/")}
    assert len(names) > 2
    for name in names:
        found, expected = logged(config.parent / "run", name), logged(validated, name)
        assert found[2] == pytest.approx(expected[2], rel=1e-6, abs=0)  # after one update
        assert found == pytest.approx(expected, rel=1e-5, abs=0)  # after five, of gradients summed in another order
    (config.parent / "run").rename(config.parent / "done")


def test_two_ranks_have_the_number_of_one(tmp_path: Path, dataset: Path, validated: Path) -> None:
    same_numbers(validated, write_config(tmp_path, dataset), 2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_sharded_weights_have_the_number_of_whole_ones(
    tmp_path: Path, dataset: Path, validated: Path, strategy: str
) -> None:
    same_numbers(validated, write_config(tmp_path, dataset), 2, train__strategy=strategy)


def test_the_best_checkpoint_stays_through_a_restart(tmp_path: Path, dataset: Path) -> None:
    """The learning rate explodes, so that the first is the best by far."""
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    best = overrides(
        **VALIDATED, checkpoint__keep=1, checkpoint__keep_best=1, optimizer__learning_rate=10.0, train__ema_decay=0.0
    )
    launch(1, "--config", str(config), *best, *overrides(train__duration="4 steps"))
    launch(1, "--config", str(config), *best, *overrides(train__duration="8 steps"))
    scores = {step: score for step, score in logged(run, "validation/ema_loss").items() if math.isfinite(score)}
    first = min(scores, key=lambda step: scores[step])
    assert first in (2, 4)
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == [
        f"step-{first:08d}",
        "step-00000008",
    ]
    assert not [event for event in events(run) if event["event"] == "damaged"]
