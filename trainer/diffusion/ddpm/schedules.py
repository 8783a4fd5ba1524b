"""Noise schedules: beta_t for t = 0..T-1 as float64, from which the process computes all its tables."""

import math
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor

from trainer.config.families import ScheduleName

# Nichol and Dhariwal 2021, section 3.2: no beta comes nearer to 1.
MAX_BETA = 0.999


def linear_betas(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Ho et al. 2020, section 4: equally spaced from beta_start to beta_end, both included, for T = 1000.

    For another T both ends are multiplied by 1000 / T, as Nichol and Dhariwal 2021 do, so that abar at the end of the
    chain stays where it was; below T = 21 that would pass 1, so no beta is above 0.999.
    Returns (T,) float64.
    """
    scale = 1000 / timesteps
    return torch.linspace(scale * beta_start, scale * beta_end, timesteps, dtype=torch.float64).clamp(max=MAX_BETA)


def sqrt_linear_betas(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """The square of equally spaced square roots, with the ends of `linear_betas`.

    Ho et al.'s code calls it "quad", that of latent diffusion (Rombach et al. 2022) "linear", diffusers
    "scaled_linear"; what latent diffusion's code calls "sqrt_linear" is Ho et al.'s linear schedule.
    Returns (T,) float64.
    """
    scale = 1000 / timesteps
    roots = torch.linspace(math.sqrt(scale * beta_start), math.sqrt(scale * beta_end), timesteps, dtype=torch.float64)
    return (roots**2).clamp(max=MAX_BETA)


def cosine_betas(timesteps: int, s: float = 0.008) -> Tensor:
    """Nichol and Dhariwal 2021, equation 17: abar(t) = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2).

    Returns (T,) float64.
    """
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    return _betas_of(torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2)


def sigmoid_betas(timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """Jabri, Fleet and Chen 2022 (arXiv 2212.11972): abar falls from 1 to 0 along a piece of a sigmoid.

    abar(t) = (g(1) - g(t/T)) / (g(1) - g(0)), g(u) = sigmoid((start + u (end - start)) / tau); the constants are those
    of Chen 2023 (arXiv 2301.10972), algorithm 1. Not the schedule that diffusers calls "sigmoid", where beta_t itself
    follows the sigmoid: that one can be given as a table.
    Returns (T,) float64.
    """
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    g = torch.sigmoid((start + u * (end - start)) / tau)
    return _betas_of((g[-1] - g) / (g[-1] - g[0]))


def _betas_of(abar: Tensor) -> Tensor:
    """beta_t = 1 - abar(t+1) / abar(t), at most 0.999: abar(T) is 0 and the last beta would be 1. (T+1,) -> (T,)."""
    return (1 - abar[1:] / abar[:-1]).clamp(max=MAX_BETA)


def table_betas(timesteps: int, table: Sequence[float] | Tensor) -> Tensor:
    """The user's own betas: T numbers in (0, 1). Returns (T,) float64. ValueError for anything else."""
    betas = torch.as_tensor(table, dtype=torch.float64)
    if betas.shape != (timesteps,):
        raise ValueError(f"table: must hold timesteps={timesteps} betas, got shape {tuple(betas.shape)}")
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"table: betas must lie in (0, 1), got {betas.min():g} to {betas.max():g}")
    return betas


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "sqrt-linear": sqrt_linear_betas,
    "sigmoid": sigmoid_betas,
}


def make_betas(name: ScheduleName, timesteps: int, table: Sequence[float] | Tensor | None = None) -> Tensor:
    """The schedule of that name with its paper's constants: (T,) float64.

    table: the betas of the schedule "table", T numbers in (0, 1); None for every other.
    Raises ValueError for another name and for a table that is missing, unasked for or no schedule.
    """
    if name not in get_args(ScheduleName):
        raise ValueError(f"schedule={name!r}: must be one of {', '.join(get_args(ScheduleName))}")
    if (name == "table") != (table is not None):
        raise ValueError(f"schedule={name!r}: goes {'with' if name == 'table' else 'without'} a table of betas")
    return SCHEDULES[name](timesteps) if table is None else table_betas(timesteps, table)
