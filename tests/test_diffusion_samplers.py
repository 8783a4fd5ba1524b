"""Ancestral sampling: algorithm 2 written as a plain loop, and as diffusers' scheduler runs it."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from trainer.diffusion.noise import Stream, keyed_normal
from trainer.diffusion.process import GaussianDiffusion, Variance
from trainer.diffusion.reverse import ReverseProcess
from trainer.diffusion.samplers import SamplingStep, ancestral, initial_noise
from trainer.diffusion.samplers import sample as run_chain

T = 50
SHAPE = (2, 3, 3)
SEED = 11
# Steeper than the paper's, so that 50 steps reach noise.
BETAS = torch.linspace(1e-4, 0.3, T, dtype=torch.float64)


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Not a good denoiser: its x0_hat leaves [-1, 1] on most steps, so that the clamp matters."""
    return 0.8 * x + 0.3 * torch.sin(3 * x + t[:, None, None, None] / 7)


def sample(index: list[int], variance: Variance = "small", seed: int = SEED) -> torch.Tensor:
    number = torch.tensor(index)
    reverse = ReverseProcess(model, GaussianDiffusion(BETAS), variance=variance)
    return run_chain(ancestral(reverse, initial_noise(number, seed, SHAPE), index=number, seed=seed))


def algorithm_2(index: int, variance: Variance, clamp: bool = True) -> torch.Tensor:
    """One sample in float64, with the posterior's textbook formula."""
    key = torch.tensor([index])
    x = keyed_normal(SEED, Stream.INITIAL, key, SHAPE).double()
    betas = BETAS.tolist()
    for t in range(T - 1, -1, -1):
        abar = math.prod(1 - beta for beta in betas[: t + 1])
        abar_prev = math.prod(1 - beta for beta in betas[:t])
        x0 = (x - math.sqrt(1 - abar) * model(x, torch.tensor([t]))) / math.sqrt(abar)
        if clamp:
            x0 = x0.clamp(-1, 1)
        mean = math.sqrt(abar_prev) * betas[t] / (1 - abar) * x0
        mean = mean + math.sqrt(1 - betas[t]) * (1 - abar_prev) / (1 - abar) * x
        sigma_squared = betas[t] if variance == "large" else betas[t] * (1 - abar_prev) / (1 - abar)
        z = keyed_normal(SEED, Stream.ANCESTRAL, key, SHAPE, sub=t).double() if t > 0 else 0
        x = mean + math.sqrt(sigma_squared) * z
    return x[0]


@pytest.mark.parametrize("variance", ["small", "large"])
def test_it_is_algorithm_2_with_the_clamp(variance: Variance) -> None:
    drawn = sample([5, 2**40], variance)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (2, *SHAPE)
    assert drawn.abs().max() <= 1
    expected = torch.stack([algorithm_2(5, variance), algorithm_2(2**40, variance)])
    torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=1e-4)
    unclamped = algorithm_2(5, variance, clamp=False)
    assert (unclamped - expected[0]).abs().max() > 0.01  # so the comparison would have seen its absence


@pytest.mark.parametrize(("variance", "name"), [("small", "fixed_small"), ("large", "fixed_large")])
def test_diffusers_scheduler_takes_the_same_steps(
    variance: Variance, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = torch.tensor([1, 2, 3])
    scheduler = DDPMScheduler(T, beta_end=0.3, variance_type=name, clip_sample=True)
    scheduler.set_timesteps(T)
    x = keyed_normal(SEED, Stream.INITIAL, index, SHAPE)
    for t in range(T - 1, -1, -1):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *_args, t=t, **_kwargs: keyed_normal(SEED, Stream.ANCESTRAL, index, SHAPE, sub=t),
        )
        x = scheduler.step(model(x, torch.full((3,), t)), t, x).prev_sample
    torch.testing.assert_close(sample([1, 2, 3], variance), x, rtol=0, atol=1e-4)


def test_a_sample_is_the_same_in_whatever_batch() -> None:
    together = sample([7, 8, 9, 10, 11])
    assert torch.equal(together[[2]], sample([9]))
    assert torch.equal(together[[4, 0]], sample([11, 7]))
    assert not torch.equal(sample([9]), sample([9], seed=SEED + 1))
    assert not torch.equal(sample([9]), sample([10]))


def test_it_reports_each_step_and_leaves_no_graph() -> None:
    steps: list[SamplingStep] = []
    weight = torch.ones((), requires_grad=True)
    reverse = ReverseProcess(lambda x, t: weight * model(x, t), GaussianDiffusion(BETAS), variance="small")
    number = torch.arange(2)
    drawn = run_chain(ancestral(reverse, initial_noise(number, SEED, SHAPE), index=number, seed=SEED), steps.append)
    assert [step.t for step in steps] == list(range(T - 1, -1, -1))
    assert torch.equal(steps[-1].x, drawn)
    assert not drawn.requires_grad
