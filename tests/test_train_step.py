"""A training step minimises what the configuration says: against the mathematics, called by hand on the same images."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.harness import load_config, write_config
from tests.networks import randomise
from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.diffusion.ddpm.objective import GaussianObjective, Loss
from trainer.diffusion.ddpm.reverse import PredictionKind, ReverseVariance
from trainer.diffusion.ddpm.timesteps import UniformTimesteps, timestep_uniform
from trainer.diffusion.keyed_noise import KeyedNoise, Stream, keyed_normal
from trainer.engine.build import build_state
from trainer.engine.step.train_step import TrainStep
from trainer.engine.strategies import DataParallel
from trainer.signals import StopRequest

T, BATCH, SEED = 20, 8, 3
POSITIONS = torch.arange(16, 24)
NOISE = KeyedNoise.training(SEED, POSITIONS)
IMAGES = torch.randint(0, 256, (BATCH, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def make_step(folder: Path, *overrides: str) -> tuple[TrainStep, Config]:
    config = load_config(
        write_config(folder, folder), "model.dropout=0.0", "data.flip=false", "optimizer.clip_norm=inf", *overrides
    )
    strategy = DataParallel(config.train)
    state = build_state(config, strategy)
    randomise(state.main.network.module)
    step = TrainStep(
        config=config,
        layout=BatchLayout.plan(BATCH, 1, config.train.micro_batch),
        state=state,
        stop=StopRequest(),
    )
    return step, config


def micro_batches(size: int) -> Iterator[dict[str, torch.Tensor]]:
    for images, positions in zip(IMAGES.split(size), POSITIONS.split(size), strict=True):
        yield {"image": images, "position": positions}


def losses_by_hand(step: TrainStep, objective: GaussianObjective, t: torch.Tensor) -> torch.Tensor:
    x0 = IMAGES.float() / 127.5 - 1
    eps = keyed_normal(SEED, Stream.EPS, POSITIONS, (3, 8, 8))
    x_t = step.state.objective.diffusion.q_sample(x0, t, eps)
    output = step.state.main.network.module(x_t, t)
    return objective.losses_and_bound(output, x0=x0, x_t=x_t, t=t, eps=eps)[0]


def gradient(step: TrainStep) -> torch.Tensor:
    return torch.cat(
        [
            parameter.grad.flatten()
            for parameter in list(step.state.main.network.module.parameters())
            if parameter.grad is not None
        ]
    )


OBJECTIVES: list[tuple[PredictionKind, Loss, ReverseVariance]] = [
    ("mu", "bound", "learned"),
    ("mu", "bound", "small"),
    ("mu", "mse", "small"),
    ("eps", "bound", "learned"),
    ("eps", "bound", "large"),
    ("eps", "mse", "large"),
    ("x0", "mse", "large"),
    ("v", "mse", "large"),
    ("eps", "hybrid", "learned-range"),
    ("eps", "bound", "learned-range"),
]


@pytest.mark.parametrize("micro_batch", [BATCH, 2])
@pytest.mark.parametrize(("prediction", "loss", "variance"), OBJECTIVES)
def test_the_loss_and_its_gradient_are_the_objectives(
    tmp_path: Path, prediction: PredictionKind, loss: Loss, variance: ReverseVariance, micro_batch: int
) -> None:
    chosen = [f"diffusion.prediction={prediction}", f"diffusion.loss={loss}", f"diffusion.variance={variance}"]
    step, _ = make_step(tmp_path, *chosen, f"train.micro_batch={micro_batch}")
    found = step.backward(micro_batches(micro_batch))
    found_gradient = gradient(step)
    step.state.main.network.optimizer.zero_grad()
    objective = GaussianObjective(step.state.objective.diffusion, prediction=prediction, loss=loss, variance=variance)
    expected = losses_by_hand(step, objective, UniformTimesteps(T).draw(NOISE)[0]).mean()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found_gradient, gradient(step), rtol=1e-3, atol=1e-5 * found_gradient.abs().max().item())


@pytest.mark.parametrize("micro_batch", [BATCH, 2])
def test_importance_weights_the_loss_and_remembers_it_unweighted(tmp_path: Path, micro_batch: int) -> None:
    importance = "diffusion.timestep_sampling=importance"
    step, _ = make_step(tmp_path, importance, f"train.micro_batch={micro_batch}")
    memory = step.state.objective.tensors()
    memory["timesteps/history"].copy_(torch.arange(1.0, T + 1)[:, None].expand(T, 10))
    memory["timesteps/counts"].fill_(10)
    p = 0.999 * torch.arange(1.0, T + 1).double() / sum(range(1, T + 1)) + 0.001 / T
    uniform = timestep_uniform(NOISE)
    t = (uniform[:, None] >= p.cumsum(0)[None]).sum(dim=1)
    weights = 1 / (T * p[t])

    found = step.backward(micro_batches(micro_batch))
    found_gradient = gradient(step)
    step.state.main.network.optimizer.zero_grad()
    unweighted = losses_by_hand(
        step, GaussianObjective(step.state.objective.diffusion, prediction="eps", loss="mse", variance="small"), t
    )
    expected = (weights.float() * unweighted).mean()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found_gradient, gradient(step), rtol=1e-3, atol=1e-5 * found_gradient.abs().max().item())

    step.update(found)
    for timestep in range(T):
        drawn = unweighted[t == timestep].tolist()
        remembered = [float(timestep + 1)] * (10 - len(drawn)) + drawn
        assert memory["timesteps/history"][timestep].tolist() == pytest.approx(remembered, rel=1e-5)


def test_a_skipped_step_teaches_nothing(tmp_path: Path) -> None:
    step, _ = make_step(tmp_path, "diffusion.timestep_sampling=importance")
    step.update(step.backward(micro_batches(BATCH)))
    memory = {name: tensor.clone() for name, tensor in step.state.objective.tensors().items()}
    assert memory["timesteps/counts"].sum() == BATCH
    with torch.no_grad():
        next(step.state.main.network.module.parameters())[0] = float("nan")
    assert not step.update(step.backward(micro_batches(BATCH))).read().networks[0].finite
    for name, tensor in step.state.objective.tensors().items():
        assert torch.equal(tensor, memory[name])
