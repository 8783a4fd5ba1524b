"""Samplers by name, for the command line."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.ddpm.samplers import Sampler, SamplingStep, ancestral, ddim
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.errors import ConfigError

SamplerName = Literal["ddpm", "ddim", "ddpm-sigma-hat", "dpm-solver++"]


@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """A sampler and, for "ddim", its eta: 0 is deterministic, 1 has the variance of ancestral sampling."""

    name: SamplerName
    eta: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}-eta-{self.eta:g}" if self.name == "ddim" else self.name


def make_sampler(choice: SamplerChoice) -> Sampler:
    """Make the sampler. Raises ConfigError where eta does not apply to it, or its library is missing."""
    if choice.eta != 0 and choice.name != "ddim":
        raise ConfigError(f"--eta {choice.eta:g}: goes with --sampler ddim")
    if not 0 <= choice.eta <= 1:
        raise ConfigError(f"--eta {choice.eta:g}: should be from 0 to 1")
    match choice.name:
        case "ddpm":
            return ancestral
        case "ddim":
            return partial(ddim, eta=choice.eta)
        case "ddpm-sigma-hat":
            return partial(ddim, eta=1.0, sigma_hat=True)
        case "dpm-solver++":
            if importlib.util.find_spec("diffusers") is None:
                raise ConfigError("--sampler dpm-solver++: needs diffusers; pip install 'ddpm-trainer[solvers]'")
            return _dpm_solver


def _dpm_solver(reverse: ReverseProcess, x: torch.Tensor, *, noise: KeyedNoise) -> Iterator[SamplingStep]:
    """DPM-Solver++(2M) (Lu et al. 2022), deterministic; the mathematics is diffusers', the network's call ours.

    It visits the timesteps of the (respaced) process, from the last one down to clean data.
    """
    del noise  # deterministic
    from diffusers import DPMSolverMultistepScheduler

    diffusion = reverse.diffusion
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=diffusion.timesteps,
        trained_betas=diffusion.betas.clamp(max=1 - 1e-6).cpu().numpy(),  # it divides by 1 - beta
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="sample",
        thresholding=False,
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    originals = diffusion.original_timesteps.tolist()  # once, since every access synchronises with the device
    steps = list(reversed(range(diffusion.timesteps)))
    solver.set_timesteps(timesteps=steps, device=x.device)
    for step in steps:
        t = torch.full((len(x),), step, device=x.device)
        x0 = reverse.step(x, t, clip=True).x0
        x = solver.step(x0, step, x).prev_sample
        yield SamplingStep(t=step, original_t=originals[step], x=x, x0=x0)
