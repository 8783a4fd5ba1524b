"""DDIM (Song, Meng and Ermon 2021): sampling with an adjustable amount of noise, and its inversion."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.diffusion.contract import Denoiser, SamplingStep
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.sampling.steps import abar_at, descending


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
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
    for step, original, t in descending(denoiser.diffusion, noise.index, start):
        p = denoiser(x, t)
        if clip:
            p = p.clipped()
        abar, abar_prev = abar_at(denoiser.diffusion, step), abar_at(denoiser.diffusion, step - 1)
        sigma_large = math.sqrt(1 - abar / abar_prev)
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * sigma_large
        # max: at t = 0 and eta = 1 rounding may leave less than nothing
        x = math.sqrt(abar_prev) * p.x0 + math.sqrt(max(1 - abar_prev - sigma**2, 0.0)) * p.eps
        if step > 0 and eta > 0:
            x = x + (sigma_large if sigma_hat else sigma) * noise.normal("step", tuple(x.shape[1:]), sub=original)
        yield SamplingStep(t=step, original_t=original, x=x, x0=p.x0)


@torch.no_grad()
def ddim_invert(denoiser: Denoiser, x0: Tensor, *, refinements: int = 1) -> Iterator[SamplingStep]:
    """Song, Meng and Ermon 2021, section 5.4: from an image to the latent that `ddim` with eta = 0 takes back to it.

    It runs the ODE (equation 14) the other way, t = 0 to T-1, with nothing clipped: `ddim` goes back with clip=False.
    Each step needs eps(x_t, t) before it has x_t, and takes eps(x_{t-1}, t). Each of the `refinements` calls the
    network once more, at the x_t found: in the limit a step is the exact inverse of ddim's (a fixed point). Over 1000
    steps an image comes back to some 5e-3 with none, as in the paper, and to 1e-4 with one.
    x0: (B, C, H, W). The last step's x is the latent.
    """
    x = x0.float()
    index = torch.arange(len(x), device=x.device)
    for step, original, t in reversed(list(descending(denoiser.diffusion, index))):
        abar, abar_prev = abar_at(denoiser.diffusion, step), abar_at(denoiser.diffusion, step - 1)
        before = x
        for _ in range(1 + refinements):
            eps = denoiser(x, t).eps
            estimate = (before - math.sqrt(1 - abar_prev) * eps) / math.sqrt(abar_prev)
            x = math.sqrt(abar) * estimate + math.sqrt(1 - abar) * eps
        yield SamplingStep(t=step, original_t=original, x=x, x0=estimate)
