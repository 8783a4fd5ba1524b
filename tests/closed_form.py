"""Denoisers of normal data in one dimension, exact in float64, and samplers read as the affine maps that they are."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from trainer.diffusion.contract import Denoiser, Prediction, SamplingStep
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.schedules import make_betas
from trainer.sampling.steps import last_of

WHOLE = GaussianDiffusion(make_betas("linear", 1000))
Eps = Callable[[Tensor, Tensor], Tensor]
"""eps* of x_t (B, 1, 1, 1) at abar (B, 1, 1, 1), float64."""


def normal_eps(mean: float, deviation: float) -> Eps:
    """-sqrt(1 - abar) score, of data that are N(mean, deviation^2)."""

    def eps(x: Tensor, abar: Tensor) -> Tensor:
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * deviation**2 + 1 - abar)

    return eps


def two_classes_eps(x: Tensor, abar: Tensor) -> Tensor:
    """Of data that are N(1, 1/4) or N(-1, 1/4), as likely."""
    variance = abar / 4 + 1 - abar
    mean = 2 * torch.sigmoid(2 * abar.sqrt() * x / variance) - 1
    return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / variance


@dataclass(frozen=True, kw_only=True)
class ExactPrediction(Prediction):
    """In float64, where the shipped families compute in float32."""

    x_t: Tensor
    abar: Tensor
    abar_prev: Tensor
    own_variance: Tensor

    @property
    def variance(self) -> Tensor:
        return self.own_variance

    def with_x0(self, x0: Tensor) -> Self:
        eps = (self.x_t - self.abar.sqrt() * x0) / (1 - self.abar).sqrt()
        alpha = self.abar / self.abar_prev
        weighted = self.abar_prev.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - self.abar_prev) * self.x_t
        return replace(self, x0=x0, eps=eps, mean=weighted / (1 - self.abar))

    def clipped(self) -> Self:
        return self.with_x0(self.x0.clamp(-1, 1))


class Exact:
    """The optimal denoiser, with the "large" or the "small" variance as guided-diffusion has them."""

    def __init__(self, eps: Eps, diffusion: GaussianDiffusion = WHOLE, *, variance: str = "large") -> None:
        self.eps = eps
        self.diffusion = diffusion
        before = torch.cat((torch.ones(1, dtype=torch.float64), diffusion.abar64[:-1]))
        beta = 1 - diffusion.abar64 / before
        beta_tilde = beta * (1 - before) / (1 - diffusion.abar64)
        self.variance = torch.cat((beta_tilde[1:2], beta[1:])) if variance == "large" else beta_tilde
        self.log_variance = torch.cat((beta_tilde[1:2], (beta if variance == "large" else beta_tilde)[1:])).log()
        self.before = before
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> ExactPrediction:
        self.calls += 1
        abar, before, variance, log_variance = (
            table[t][:, None, None, None]
            for table in (self.diffusion.abar64, self.before, self.variance, self.log_variance)
        )
        x0 = (x - (1 - abar).sqrt() * self.eps(x, abar)) / abar.sqrt()
        blank = ExactPrediction(
            x0=x0,
            eps=x0,
            mean=x0,
            log_variance=log_variance,
            x_t=x,
            abar=abar,
            abar_prev=before,
            own_variance=variance,
        )
        return blank.with_x0(x0)


class OneHotNoise:
    """For some samples: sample 0 has x_T = 1, sample 1 + t has z_t = 1, and everything else is 0.

    samples: T + 2 for samplers that draw noise at every step, 2 for those that draw none.
    """

    def __init__(self, diffusion: GaussianDiffusion, samples: int) -> None:
        self.originals = diffusion.original_timesteps.tolist()
        self.index = torch.arange(samples)

    def normal(self, purpose: str, shape: tuple[int, ...], sub: int | None = None) -> Tensor:
        place = 0 if purpose == "initial" else 1 + self.originals.index(sub)
        return (self.index == place).double().reshape(-1, 1, 1, 1).expand(-1, *shape)


def mean_and_deviation(
    sampler: Callable[..., Iterator[SamplingStep]], denoiser: Denoiser, *, samples: int
) -> tuple[float, float]:
    """Of what a sampler draws, exactly, where its steps are affine; samples: see `OneHotNoise`."""
    noise = OneHotNoise(denoiser.diffusion, samples)
    x = last_of(sampler(denoiser, noise.normal("initial", (1, 1, 1)), noise=noise)).flatten().double()
    return x[-1].item(), math.sqrt((x[:-1] - x[-1]).square().sum().item())
