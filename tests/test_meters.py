"""Meters: sums against arithmetic by hand, intervals that no restart changes, the noise scale of a known noise."""

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness import checkpoint, launch, load_config, overrides, read_verified, write_config
from trainer.config import Config
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.stream.batches import read_batch
from trainer.data.stream.stream import BatchLayout
from trainer.data.training_data import open_training_data
from trainer.diffusion.contract import Losses
from trainer.engine.build import build_objective, build_state
from trainer.engine.network.build import build_network
from trainer.engine.network.cost import cost_of
from trainer.engine.state.ema import constant
from trainer.engine.state.train_state import TrainState
from trainer.engine.step.train_step import TrainStep
from trainer.engine.strategies import DataParallel
from trainer.models.backbones import example_inputs
from trainer.signals import StopRequest
from trainer.telemetry import step_clock
from trainer.telemetry.device import data_sheet, data_sheet_of, device_peak, peak_teraflops
from trainer.telemetry.meters import STEP_SUMS, Meters, StepFigures, step_sums
from trainer.telemetry.noise_scale import GradientNoise
from trainer.telemetry.step_clock import StepClock

TIMESTEPS = 10  # its quarters are 0-2, 3-4, 5-7, 8-9


def random_images(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(0, TIMESTEPS, (count,), generator=generator)
    return {
        "t": t,
        "level": t / TIMESTEPS,
        "loss": torch.rand(count, generator=generator),
        "bound": torch.rand(count, generator=generator),
        "weight": torch.rand(count, generator=generator),
    }


@pytest.mark.parametrize("weighted", [True, False])
def test_a_steps_sums_are_those_of_its_images(weighted: bool) -> None:
    images = random_images(64)
    if not weighted:
        images["weight"] = None
    whole = step_sums(Losses(**images))
    halves = [
        step_sums(Losses(**{k: None if v is None else v[half] for k, v in images.items()}))
        for half in (slice(0, 32), slice(32, 64))
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole)
    figures = StepFigures.read(whole.tolist(), global_batch=64, bound_terms=TIMESTEPS, noise=None)
    weight = [1.0] * 64 if images["weight"] is None else images["weight"].tolist()
    for quarter in range(4):
        those = [i for i, t in enumerate(images["t"].tolist()) if quarter <= 4 * t / TIMESTEPS < quarter + 1]
        assert 0 < len(those) < 32
        assert figures.quartile_losses[quarter] == pytest.approx(sum(weight[i] * images["loss"][i] for i in those))
        assert figures.quartile_images[quarter] == pytest.approx(sum(weight[i] for i in those))
    bound = sum(w * b for w, b in zip(weight, images["bound"].tolist(), strict=True))
    assert figures.bound_bits == pytest.approx(TIMESTEPS * bound / 64)


def test_a_steps_sums_need_no_word_from_the_device() -> None:
    """A tensor on "meta" has no values: any read of one by the host is an error."""
    images = {name: value.to("meta") for name, value in random_images(8).items()}
    assert step_sums(Losses(**images)).shape == (STEP_SUMS,)


def random_steps(count: int) -> Iterator[dict[str, object]]:
    rng = random.Random(0)
    for _ in range(count):
        figures = StepFigures(
            quartile_losses=[rng.random() for _ in range(4)],
            quartile_images=[rng.random() for _ in range(4)],
            bound_bits=rng.random(),
            noise=GradientNoise(rng.random(), rng.random()),
        )
        yield {"loss": rng.random(), "grad_norm": rng.random(), "figures": figures}


def test_an_interval_is_the_mean_of_its_steps_and_then_forgotten() -> None:
    meters, steps = Meters(), list(random_steps(7))
    for step in steps[:4]:
        meters.add(**step)
    meters.take()
    for step in steps[4:]:
        meters.add(**step)
    values, figures = meters.take(), [step["figures"] for step in steps[4:]]
    assert values["train/loss"] == pytest.approx(np.mean([step["loss"] for step in steps[4:]]))
    assert values["train/grad_norm"] == steps[-1]["grad_norm"]
    assert values["train/grad_norm_max"] == max(step["grad_norm"] for step in steps[4:])
    assert values["train/bound_bits_per_dim"] == pytest.approx(np.mean([each.bound_bits for each in figures]))
    for number in range(4):
        losses, images = (
            sum(getattr(each, name)[number] for each in figures) for name in ("quartile_losses", "quartile_images")
        )
        assert values[f"train/loss_q{number + 1}"] == pytest.approx(losses / images)
    weights = [0.99 ** (6 - number) for number in range(7)]  # of all steps, logged or not
    smoothed = sum(w * step["loss"] for w, step in zip(weights, steps, strict=True)) / sum(weights)
    assert values["train/loss_smoothed"] == pytest.approx(smoothed)
    variance, square = (
        sum(w * getattr(step["figures"].noise, name) for w, step in zip(weights, steps, strict=True))
        for name in ("variance", "square")
    )
    assert values["train/noise_scale"] == pytest.approx(variance / square)
    assert meters.take() == {}  # no step, no scalar


def test_meters_go_through_a_checkpoint_unchanged() -> None:
    whole, parts, steps = Meters(), Meters(), list(random_steps(9))
    for number, step in enumerate(steps):
        whole.add(**step)
        parts.add(**step)
        if number % 2:
            parts = Meters.from_state(json.loads(json.dumps(parts.state())))
    assert parts == whole
    assert parts.take() == whole.take()
    assert Meters.from_state({}) == Meters()  # of a checkpoint that knows of none


def test_the_noise_scale_of_a_known_noise() -> None:
    """Gradients of images ~ N(G, Sigma), |G|^2 = 4 and tr(Sigma) = 50."""
    rng = np.random.default_rng(0)
    true, deviation = np.array([2.0, 0, 0, 0, 0]), np.sqrt(10.0)
    estimates = []
    for _ in range(4000):
        images = true + deviation * rng.standard_normal((32, 5))
        small = (images.reshape(4, 8, 5).mean(axis=1) ** 2).sum(axis=1).mean()
        large = (images.mean(axis=0) ** 2).sum()
        estimates.append(GradientNoise.estimate(small_square=small, small_batch=8, large_square=large, large_batch=32))
    square, variance = np.mean(estimates, axis=0)
    assert square == pytest.approx(4.0, rel=0.05)
    assert variance == pytest.approx(50.0, rel=0.05)
    with pytest.raises(ValueError, match="small_batch=32: must be positive and less than large_batch=32"):
        GradientNoise.estimate(small_square=1.0, small_batch=32, large_square=1.0, large_batch=32)


def first_step(config: Config, *, images: slice, micro_batch: int | None) -> TrainStep:
    """The backward pass of the run's first step over a part of its first global batch."""
    opened, ids = ShardedDataset(Path(config.data.path or "")), open_training_data(config, index_folder=None).order.ids
    positions = np.arange(config.train.global_batch)[images]
    batch = read_batch(opened, (positions.tolist(), ids(positions).tolist()))
    strategy = DataParallel(config.train)
    step = TrainStep(
        config=config,
        layout=BatchLayout.plan(len(positions), 1, micro_batch),
        state=build_state(config, strategy),
        stop=StopRequest(),
    )
    size = step.layout.micro_batch
    parts = ({name: value[n : n + size] for name, value in batch.items()} for n in range(0, len(positions), size))
    step.backward(parts)
    return step


def gradient_of(step: TrainStep) -> torch.Tensor:
    parameters = step.state.main.network.module.parameters()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()


@pytest.mark.parametrize(("processes", "micro_batch"), [(2, 4), (2, 2), (1, 2)])
def test_the_gradient_of_a_part_is_taken_before_it_is_averaged(
    tmp_path: Path, dataset: Path, processes: int, micro_batch: int
) -> None:
    """(2, 4) in the communication hook, (2, 2) and (1, 2) after the first micro-batch; against gradients by hand."""
    path = write_config(tmp_path, dataset)
    settings = {"train__duration": "1 steps", "train__micro_batch": micro_batch, "model__dropout": 0.0}
    launch(processes, "--config", str(path), *overrides(**settings))
    config = load_config(path, "model.dropout=0.0")
    share = 8 // processes
    own = [slice(rank * share, rank * share + micro_batch) for rank in range(processes)]
    squares = [gradient_of(first_step(config, images=images, micro_batch=None)).square().sum().item() for images in own]
    large = gradient_of(first_step(config, images=slice(0, 8), micro_batch=None)).square().sum().item()
    expected = GradientNoise.estimate(
        small_square=float(np.mean(squares)), small_batch=micro_batch, large_square=large, large_batch=8
    )
    meters = read_verified(checkpoint(tmp_path / "run", 1))[1]["state"]["meters"]
    assert meters["noise_steps"] == 0  # logged
    assert meters["noise_square"] / 0.01 == pytest.approx(expected.square, rel=1e-3)
    assert meters["noise_variance"] / 0.01 == pytest.approx(expected.variance, rel=1e-3)


def test_one_gradient_alone_has_no_noise_scale(config_path: Path) -> None:
    config = load_config(config_path)
    step = first_step(config, images=slice(0, 8), micro_batch=None)
    assert step.phases[0].gradient_square.batch is None
    assert step.update(torch.tensor(1.0)).read().networks[0].figures.noise is None


def test_the_distance_from_the_average(config_path: Path) -> None:
    config = load_config(config_path)
    strategy = DataParallel(config.train)
    network = build_state(config, strategy).main.network
    state = TrainState(strategy, {"model": network}, {"ema": constant(0.9)}, build_objective(config, strategy.device))
    assert state.main.averages.squared_distance()[0] == 0
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.mul_(2)
    distance, weights = state.main.averages.squared_distance().tolist()
    assert weights == pytest.approx(sum(p.square().sum().item() for p in network.module.parameters()))
    assert distance / weights == pytest.approx(0.25)


def test_percentiles_of_steps_leave_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now)
    clock = StepClock(torch.device("cpu"))
    assert clock.take() == {}
    clock.start()
    for seconds in [0.2] * 18 + [0.3, 5.0]:
        now += seconds
        clock.step_ended()
    now += 1000.0
    clock.start()
    assert clock.take() == pytest.approx(
        {"time/step_seconds_p50": 0.2, "time/step_seconds_p95": 0.3, "time/step_seconds_max": 5.0}
    )
    for seconds in (4.0, 1.0, 3.0, 2.0):
        now += seconds
        clock.step_ended()
    assert clock.take()["time/step_seconds_p50"] == pytest.approx(2.0)  # one that was measured, no mean of two


def test_the_peak_is_the_data_sheets_or_measured() -> None:
    def known(name: str, arithmetic: str) -> float | None:
        sheet = data_sheet(name)
        return peak_teraflops(sheet, arithmetic) if sheet is not None else None

    assert known("NVIDIA H100 80GB HBM3", "bf16") == 989.5
    assert known("NVIDIA H100 PCIe", "fp16") == 756.0
    assert known("NVIDIA A100-SXM4-80GB", "tf32") == 156.0
    assert known("NVIDIA L40S", "fp32") == 91.6
    assert known("NVIDIA L4", "fp32") == 30.3
    assert known("NVIDIA L40", "fp32") is None
    assert known("NVIDIA B200", "fp32") is None
    assert known("Tesla V100-SXM2-16GB", "fp16") == 125.0
    assert known("Tesla V100-PCIE-16GB", "fp16") == 112.0
    assert known("Tesla V100-SXM2-16GB", "bf16") is None  # which it does not multiply
    assert known("NVIDIA GeForce RTX 4090", "bf16") == 165.2
    assert data_sheet_of("h100-pcie") == data_sheet("NVIDIA H100 PCIe")
    assert data_sheet_of("rtx4090") == data_sheet_of("RTX 4090") == data_sheet("NVIDIA GeForce RTX 4090")
    assert data_sheet_of("h1000") is None
    peak = device_peak(torch.device("cpu"), "fp32")
    assert 1e8 < peak.flops < 1e14
    assert peak.source == "a matrix product in fp32, timed at the start"


def test_training_takes_at_most_three_times_the_flops_of_a_forward_pass(config_path: Path) -> None:
    config = load_config(config_path)
    network = build_network(config)
    cost = cost_of(lambda: build_network(config), partial(example_inputs, config.model))
    assert 2 * cost.forward_flops < cost.training_flops < 3.01 * cost.forward_flops
    assert cost.parameters == sum(parameter.numel() for parameter in network.parameters())
