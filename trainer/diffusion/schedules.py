"""Noise schedules: beta_t for t = 0..T-1 as float64, from which the process computes all its tables."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

ScheduleName = Literal["linear", "cosine"]


def linear_betas(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Ho et al. 2020, section 4: equally spaced from beta_start to beta_end, both included, whatever T is.

    Returns (T,) float64.
    """
    return torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Nichol and Dhariwal 2021, equation 17: abar(t) = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2).

    beta_t = 1 - abar(t+1) / abar(t), at most max_beta: abar(T) is 0 and the last beta would be 1.
    Returns (T,) float64.
    """
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def make_betas(name: ScheduleName, timesteps: int) -> Tensor:
    """The schedule of that name with its paper's constants: (T,) float64. Raises ValueError for another name."""
    match name:
        case "linear":
            return linear_betas(timesteps)
        case "cosine":
            return cosine_betas(timesteps)
        case _:
            raise ValueError(f"schedule={name!r}: must be one of {', '.join(get_args(ScheduleName))}")
