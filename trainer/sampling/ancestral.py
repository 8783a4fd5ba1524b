"""Ancestral sampling: a draw from the reverse process at every step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.diffusion.contract import Denoiser, SamplingStep
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.sampling.steps import descending


@torch.no_grad()
def ancestral(
    denoiser: Denoiser,
    x: Tensor,
    *,
    noise: KeyedNoise,
    start: int | None = None,
    clip: bool = True,
) -> Iterator[SamplingStep]:
    """Ho et al. 2020, algorithm 2: x_{t-1} ~ N(mean, sigma_t^2) of the reverse process, without noise at t = 0.

    x: x_T, which is `noise.normal("initial", (C, H, W))`, or x_start; noise: `KeyedNoise.sampling` of the samples'
    numbers, on x's device; start: the first timestep of the chain to undo, by default T-1; clip: clamp each x_0 to
    [-1, 1], as the authors do.
    """
    for step, original, t in descending(denoiser.diffusion, noise.index, start):
        p = denoiser(x, t)
        if clip:
            p = p.clipped()
        x = p.mean
        if step > 0:
            x = x + torch.exp(0.5 * p.log_variance) * noise.normal("step", tuple(x.shape[1:]), sub=original)
        yield SamplingStep(t=step, original_t=original, x=x, x0=p.x0_of_mean)
