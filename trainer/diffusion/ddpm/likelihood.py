"""The variational bound in bits per dimension (Ho et al. 2020, equation 5) and what is read off it.

The term at timestep t of 0..T-1 is the paper's L_t: at t = 0 that of the decoder, L_0. The paper's L_T is the prior.
Images are (B, C, H, W) in [-1, 1], their values the 256 multiples of 1/127.5 - 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.reverse import ReverseProcess, ReverseStep
from trainer.diffusion.keyed_noise import Stream, keyed_normal

Cdf = Literal["exact", "tanh"]

BIN = 1 / 255  # half the width of a value's bin
EDGE = 0.999  # beyond it a value is the first or the last, whose bin has no end
LEAST_PROBABILITY = 1e-12  # the authors take no logarithm of less
FAR = 100.0  # standard deviations beyond which no mass is left


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats for each element. They broadcast."""
    difference = log_variance2 - log_variance1
    # expm1: the variances of one step are nearly equal, and exp(-difference) - 1 + difference would be rounding.
    spread = difference + torch.expm1(-difference)
    return 0.5 * (spread + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor, cdf: Cdf = "exact") -> Tensor:
    """Equation 13: -log of N(mean, exp(log_scale)^2)'s mass in each value's bin, in nats for each element.

    x: any shape, values of 8-bit images in [-1, 1]; mean, log_scale (of the standard deviation, not the variance): they
    broadcast to it. cdf: "exact", or "tanh" for the authors' approximation (off by at most 1.8e-4). A bin's mass counts
    as at least 1e-12. Returns float32.
    """
    centered, scale = x.float() - mean.float(), torch.exp(-log_scale.float())
    # Clamped far outside all mass, where the gradients of log_ndtr would overflow.
    lower, upper = ((scale * (centered + end)).clamp(-FAR, FAR) for end in (-BIN, BIN))
    log_mass = _log_mass_tanh if cdf == "tanh" else _log_mass
    first, last, inner = log_mass(lower, upper)
    chosen = torch.where(x < -EDGE, first, torch.where(x > EDGE, last, inner))
    return -chosen.clamp(min=math.log(LEAST_PROBABILITY))


def _log_mass(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P(z < upper), log P(z > lower) and log P(lower < z < upper) of a standard normal z.

    A difference of two CDFs near 1 loses in float32 whatever is below 6e-8 (five standard deviations out). log_ndtr
    keeps its relative precision in both tails, so the difference is taken of logarithms:
    P(z < upper) (1 - P(z < lower) / P(z < upper)).
    """
    log_below, log_cdf = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    # A bin so narrow that its ends are equal has no logarithm, nor a gradient; its mass is below the least anyway.
    ratio = (log_below - log_cdf).clamp(max=-LEAST_PROBABILITY)
    return log_cdf, torch.special.log_ndtr(-lower), log_cdf + torch.log(-torch.expm1(ratio))


def _log_mass_tanh(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the authors' CDF: 0.5 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))."""
    below, above = (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) for z in (lower, upper))
    first, last, inner = above, 1 - below, above - below
    return tuple(mass.clamp(min=LEAST_PROBABILITY).log() for mass in (first, last, inner))  # type: ignore[return-value]


def prior_bits(diffusion: GaussianDiffusion, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, 1)) in bits per dimension: (B, C, H, W) -> (B,) float32.

    It is 0.5 (abar E[x_0^2] - abar - log(1 - abar)). abar and log(1 - abar), both near 4e-5, cancel to 8e-10, so they
    are added in float64, on the host.
    """
    abar = diffusion.abar64[-1].item()
    constant = -abar - math.log1p(-abar)
    return 0.5 * (abar * x0.float().square().mean(dim=(1, 2, 3)) + constant) / math.log(2)


def bound_bits(
    step: ReverseStep, x0: Tensor, x_t: Tensor, t: Tensor, diffusion: GaussianDiffusion, cdf: Cdf = "exact"
) -> Tensor:
    """One term of equation 5 for each image, in bits per dimension: (B,) float32. Differentiable.

    For t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the discretised decoder's -log p(x_0 | x_t);
    the mean over C, H, W. The bound is the sum of the terms of all t, plus `prior_bits`.
    """
    true_log_variance = diffusion.posterior_log_variance(t, "small")[:, None, None, None]
    true_mean = diffusion.posterior_mean(x0, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, step.mean, step.log_variance)
    decoder = discretised_gaussian_nll(x0, step.mean, 0.5 * step.log_variance, cdf)
    nats = torch.where(t == 0, decoder.mean(dim=(1, 2, 3)), kl.mean(dim=(1, 2, 3)))
    return nats / math.log(2)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of one timestep for each image, each (B,) float32.

    bits: the term of the bound, bits per dimension; x0_mse, eps_mse: mean squared errors of the network's x_0 and of
    the eps that goes with it.
    """

    bits: Tensor
    x0_mse: Tensor
    eps_mse: Tensor


def term_bits(
    reverse: ReverseProcess, x0: Tensor, x_t: Tensor, t: Tensor, *, clip: bool = True, cdf: Cdf = "exact"
) -> Terms:
    """The term at t (B,) for images x0 that were noised to x_t: one call of the network.

    clip: clamp the network's x_0 to [-1, 1], as the authors do in evaluation, not in training.
    """
    step = reverse(x_t, t)
    if clip:
        step = step.clipped()
    eps = reverse.diffusion.predict_eps(x_t, t, x0)
    return Terms(
        bits=bound_bits(step, x0, x_t, t, reverse.diffusion, cdf),
        x0_mse=(step.x0 - x0.float()).square().mean(dim=(1, 2, 3)),
        eps_mse=(step.eps - eps).square().mean(dim=(1, 2, 3)),
    )


@dataclass(frozen=True, kw_only=True)
class BitsPerDim:
    """The bound of each image: `bits`, `x0_mse`, `eps_mse` (B, T), with column t as in `Terms`; `prior` (B,)."""

    bits: Tensor
    x0_mse: Tensor
    eps_mse: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """The bound on -log2 p(x_0) per dimension: (B,)."""
        return self.prior + self.bits.sum(dim=1)


@torch.no_grad()
def bits_per_dim(
    reverse: ReverseProcess,
    x0: Tensor,
    index: Tensor,
    seed: int,
    *,
    clip: bool = True,
    cdf: Cdf = "exact",
    on_step: Callable[[int], object] | None = None,
) -> BitsPerDim:
    """Every term of the bound for a batch of images, with one fresh eps for each image and timestep.

    x0: (B, C, H, W); index: (B,) int64, the images' numbers, on its device. The noise is keyed by (seed, number, the
    original timestep), so an image's bits do not depend on its batch. on_step: called with t = T-1, ..., 0.
    Over a respaced chain it is that chain's bound.
    """
    diffusion = reverse.diffusion
    columns: list[Terms] = []
    for step in reversed(range(diffusion.timesteps)):
        t = torch.full_like(index, step)
        eps = keyed_normal(seed, Stream.LIKELIHOOD, index, tuple(x0.shape[1:]), sub=diffusion.original_t(t))
        columns.append(term_bits(reverse, x0, diffusion.q_sample(x0, t, eps), t, clip=clip, cdf=cdf))
        if on_step is not None:
            on_step(step)
    columns.reverse()
    return BitsPerDim(
        bits=torch.stack([column.bits for column in columns], dim=1),
        x0_mse=torch.stack([column.x0_mse for column in columns], dim=1),
        eps_mse=torch.stack([column.eps_mse for column in columns], dim=1),
        prior=prior_bits(diffusion, x0),
    )


@dataclass(frozen=True, kw_only=True)
class RateDistortion:
    """Figure 5 for each image: column k is what a receiver holds after k + 1 reverse steps; each (B, T) float32.

    rate: bits per dimension received so far; mse: mean squared error of its estimate of the image, in units of the
    256 values: the paper's distortion is the root of its mean over images.
    """

    rate: Tensor
    mse: Tensor


def rate_distortion(likelihood: BitsPerDim) -> RateDistortion:
    """Progressive coding (section 4.3, algorithms 3 and 4) as read off the bound.

    A receiver of x_T, ..., x_t has paid the prior and the terms above t, holds x_t as drawn from q(x_t | x_0), and
    estimates x_0 by equation 15. The paper's "reverse step" T - t is column T - t - 1: the last holds the whole rate
    without the decoder, and the error left to the decoder.
    """
    received = likelihood.bits.flip(1).cumsum(dim=1)
    before = torch.cat((torch.zeros_like(received[:, :1]), received[:, :-1]), dim=1)
    return RateDistortion(rate=likelihood.prior[:, None] + before, mse=likelihood.x0_mse.flip(1) * 127.5**2)
