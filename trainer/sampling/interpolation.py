"""Interpolation in the space of noised images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from trainer.diffusion.contract import Denoiser, SamplingStep
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.sampling.ancestral import ancestral
from trainer.sampling.steps import last_of


@torch.no_grad()
def interpolate(
    denoiser: Denoiser,
    first: Tensor,
    second: Tensor,
    *,
    t: int,
    lambdas: Sequence[float],
    noise: KeyedNoise,
    sampler: Callable[..., Iterator[SamplingStep]] = ancestral,
    on_step: Callable[[SamplingStep], object] | None = None,
) -> Tensor:
    """Ho et al. 2020, section 4.3 and figures 8 and 9: images between two, mixed where they are noise.

    Both are noised to the paper's x_t, with the same eps; (1 - lambda) first + lambda second is taken back by t reverse
    steps, with the same z for every lambda. t counts steps, as in the paper: 0 mixes the pixels, the chain's whole
    length leaves nothing of the images, and in between the first step to be undone is timestep t - 1 of 0..T-1.

    first, second: (B, C, H, W) in [-1, 1]; noise: `KeyedNoise.sampling` of B numbers. Returns (len(lambdas), B, C, H,
    W). on_step: called with every step. ValueError for a t outside 0..T.
    """
    timesteps = denoiser.diffusion.timesteps
    if not 0 <= t <= timesteps:
        raise ValueError(f"t={t}: must be from 0 to the chain's {timesteps} steps")
    ends = torch.stack((first.float(), second.float()))
    if t > 0:
        noised_to = torch.full_like(noise.index, t - 1)
        eps = noise.normal("initial", tuple(first.shape[1:]))
        ends = torch.stack([denoiser.diffusion.q_sample(end, noised_to, eps) for end in ends])
    mixed = torch.stack([(1 - share) * ends[0] + share * ends[1] for share in lambdas])
    if t == 0:
        return mixed
    everywhere = rearrange(mixed, "l b c h w -> (l b) c h w")
    repeated = replace(noise, index=noise.index.repeat(len(lambdas)))
    drawn = last_of(sampler(denoiser, everywhere, noise=repeated, start=t - 1), on_step)
    return rearrange(drawn, "(l b) c h w -> l b c h w", l=len(lambdas))
