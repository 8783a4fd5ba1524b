"""DPM-Solver++: a second-order solver of the probability-flow ODE."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.diffusion.contract import Denoiser, SamplingStep
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.sampling.steps import descending


@torch.no_grad()
def dpm_solver(denoiser: Denoiser, x: Tensor, *, noise: KeyedNoise) -> Iterator[SamplingStep]:
    """DPM-Solver++(2M) (Lu et al. 2022), deterministic; the mathematics is diffusers', the network's call ours.

    It visits the timesteps of the (respaced) process, from the last one down to clean data.
    """
    from diffusers import DPMSolverMultistepScheduler

    diffusion = denoiser.diffusion
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
    solver.set_timesteps(timesteps=list(reversed(range(diffusion.timesteps))), device=x.device)
    for step, original, t in descending(diffusion, noise.index):
        x0 = denoiser(x, t).clipped().x0
        x = solver.step(x0, step, x).prev_sample
        yield SamplingStep(t=step, original_t=original, x=x, x0=x0)
