"""Drawing images from a trained network: chains of reverse steps, as iterators that yield after each.

All noise is keyed by (seed, sample, original timestep), so a sample is the same in whatever batch it is drawn, up to
the network's own rounding, and all samplers see the same z at the same timestep. Each runs over the whole of the
reverse process's chain, which may be respaced, or from `start` down. Images are (B, C, H, W) float32.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.keyed_noise import KeyedNoise


@dataclass(frozen=True, kw_only=True)
class SamplingStep:
    """What a step has led to.

    t: the step, counted in the chain's own timesteps; original_t: the same in those of the network; x: the images after
    it, so x_{t-1}, the samples themselves after t = 0 (or x_t, when inverting); x0: the estimate of the samples that
    the step was made with (Ho et al. 2020, section 4.3: progressive generation).
    """

    t: int
    original_t: int
    x: Tensor
    x0: Tensor


class Sampler(Protocol):
    """A way from noise to samples: yields a state after each step, the samples last."""

    def __call__(self, reverse: ReverseProcess, x: Tensor, *, noise: KeyedNoise) -> Iterator[SamplingStep]:
        """x: (B, C, H, W) float32, `noise.normal("initial", (C, H, W))`; noise: `KeyedNoise.sampling` of B samples."""


# `ancestral`, or either sampler with options bound by functools.partial.
Chain = Callable[..., Iterator[SamplingStep]]


def sample(chain: Iterable[SamplingStep], on_step: Callable[[SamplingStep], None] | None = None) -> Tensor:
    """Run a chain to its end; returns the images after its last step. `on_step` is called with every step."""
    last = None
    for last in chain:
        if on_step is not None:
            on_step(last)
    if last is None:
        raise ValueError("chain: must have a step")
    return last.x


@torch.no_grad()
def ancestral(
    reverse: ReverseProcess,
    x: Tensor,
    *,
    noise: KeyedNoise,
    start: int | None = None,
    clip: bool = True,
) -> Iterator[SamplingStep]:
    """Ho et al. 2020, algorithm 2: x_{t-1} ~ N(mean, sigma_t^2) of the reverse process, without noise at t = 0.

    x: x_T, which is `noise.normal("initial", (C, H, W))`, or x_start; noise: `KeyedNoise.sampling` of the samples'
    numbers, on x's device; start: the first timestep of the chain to undo, T-1 without; clip: clamp each x_0 to
    [-1, 1], as the authors do.
    """
    for step, original, t in _timesteps(reverse.diffusion, noise.index, start):
        p = reverse.step(x, t, clip=clip)
        x = p.mean
        if step > 0:
            x = x + torch.exp(0.5 * p.log_variance) * noise.normal("step", tuple(x.shape[1:]), sub=original)
        yield SamplingStep(t=step, original_t=original, x=x, x0=p.x0)


@torch.no_grad()
def ddim(
    reverse: ReverseProcess,
    x: Tensor,
    *,
    noise: KeyedNoise,
    eta: float = 0.0,
    sigma_hat: bool = False,
    start: int | None = None,
    clip: bool = True,
) -> Iterator[SamplingStep]:
    """Song, Meng and Ermon 2021, equation 12, with sigma of equation 16.

    x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma^2) eps + sigma z, with
    sigma = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1}). eta = 0 draws no noise at all;
    eta = 1 is `ancestral` with the variance "small".

    sigma_hat: with eta = 1, noise of the larger sigma = sqrt(1 - abar_t / abar_{t-1}) under the same mean (section
    5.1 and appendix D.3), which is `ancestral` with the variance "large". The reverse process's own variance is not
    used. Where x_0 is clipped, eps is derived from it again. Other arguments: `ancestral`.

    ValueError for an eta outside [0, 1], and for sigma_hat with another eta than 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta:g}: must be in [0, 1]")
    if sigma_hat and eta != 1:
        raise ValueError(f"sigma_hat=True: goes with the mean of eta=1, got eta={eta:g}")
    for step, original, t in _timesteps(reverse.diffusion, noise.index, start):
        p = reverse.step(x, t, clip=clip)
        abar, abar_prev = _abar(reverse.diffusion, step), _abar(reverse.diffusion, step - 1)
        sigma_large = math.sqrt(1 - abar / abar_prev)
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * sigma_large
        # max: at t = 0 and eta = 1 rounding may leave less than nothing
        x = math.sqrt(abar_prev) * p.x0 + math.sqrt(max(1 - abar_prev - sigma**2, 0.0)) * p.eps
        if step > 0 and eta > 0:
            x = x + (sigma_large if sigma_hat else sigma) * noise.normal("step", tuple(x.shape[1:]), sub=original)
        yield SamplingStep(t=step, original_t=original, x=x, x0=p.x0)


@torch.no_grad()
def ddim_invert(reverse: ReverseProcess, x0: Tensor, *, refinements: int = 1) -> Iterator[SamplingStep]:
    """Song, Meng and Ermon 2021, section 5.4: from an image to the latent that `ddim` with eta = 0 takes back to it.

    It runs the ODE (equation 14) the other way, t = 0 to T-1, with nothing clipped: `ddim` must be told clip=False.
    Each step needs eps(x_t, t) before it has x_t, and takes eps(x_{t-1}, t). Each of the `refinements` calls the
    network once more, at the x_t found: in the limit a step is the exact inverse of ddim's (a fixed point). Over 1000
    steps an image comes back to some 5e-3 with none, as in the paper, and to 1e-4 with one.
    x0: (B, C, H, W). The last step's x is the latent.
    """
    x = x0.float()
    index = torch.arange(len(x), device=x.device)
    for step, original, t in reversed(list(_timesteps(reverse.diffusion, index, None))):
        abar, abar_prev = _abar(reverse.diffusion, step), _abar(reverse.diffusion, step - 1)
        before = x
        for _ in range(1 + refinements):
            eps = reverse.step(x, t, clip=False).eps
            estimate = (before - math.sqrt(1 - abar_prev) * eps) / math.sqrt(abar_prev)
            x = math.sqrt(abar) * estimate + math.sqrt(1 - abar) * eps
        yield SamplingStep(t=step, original_t=original, x=x, x0=estimate)


@torch.no_grad()
def interpolate(
    reverse: ReverseProcess,
    first: Tensor,
    second: Tensor,
    *,
    t: int,
    lambdas: Sequence[float],
    noise: KeyedNoise,
    chain: Chain = ancestral,
) -> Tensor:
    """Ho et al. 2020, section 4.3 and figures 8 and 9: images between two, mixed where they are noise.

    Both are noised to the paper's x_t, with the same eps; (1 - lambda) first + lambda second is taken back by t reverse
    steps, with the same z for every lambda. t counts steps, as in the paper: 0 mixes the pixels, the chain's whole
    length leaves nothing of the images, and in between the first step to be undone is this module's timestep t - 1.

    first, second: (B, C, H, W) in [-1, 1]; noise: `KeyedNoise.sampling` of B numbers. Returns (len(lambdas), B, C, H,
    W). ValueError for a t outside 0..T.
    """
    timesteps = reverse.diffusion.timesteps
    if not 0 <= t <= timesteps:
        raise ValueError(f"t={t}: must be from 0 to the chain's {timesteps} steps")
    ends = torch.stack((first.float(), second.float()))
    if t > 0:
        noised_to = torch.full_like(noise.index, t - 1)
        eps = noise.normal("initial", tuple(first.shape[1:]))
        ends = torch.stack([reverse.diffusion.q_sample(end, noised_to, eps) for end in ends])
    mixed = torch.stack([(1 - share) * ends[0] + share * ends[1] for share in lambdas])
    if t == 0:
        return mixed
    everywhere = rearrange(mixed, "l b c h w -> (l b) c h w")
    repeated = replace(noise, index=noise.index.repeat(len(lambdas)))
    drawn = sample(chain(reverse, everywhere, noise=repeated, start=t - 1))
    return rearrange(drawn, "(l b) c h w -> l b c h w", l=len(lambdas))


def _timesteps(diffusion: GaussianDiffusion, index: Tensor, start: int | None) -> Iterator[tuple[int, int, Tensor]]:
    """t = start, ..., 0 with its original timestep, and t for each sample: (B,)."""
    start = diffusion.timesteps - 1 if start is None else start
    if not 0 <= start < diffusion.timesteps:
        raise ValueError(f"start={start}: must be a timestep of the chain, 0 to {diffusion.timesteps - 1}")
    originals = diffusion.original_timesteps.tolist()
    for step in range(start, -1, -1):
        yield step, originals[step], torch.full_like(index, step)


def _abar(diffusion: GaussianDiffusion, step: int) -> float:
    """abar_t, and 1 for the images themselves at t = -1."""
    return diffusion.abar64[step].item() if step >= 0 else 1.0
