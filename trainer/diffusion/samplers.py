"""Drawing images from a trained network."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.diffusion.noise import Stream, keyed_normal
from trainer.diffusion.process import GaussianDiffusion, Variance


@torch.no_grad()
def ancestral_sample(
    model: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    *,
    shape: tuple[int, int, int],
    index: Tensor,
    seed: int,
    variance: Variance,
    device: torch.device | str,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Ho et al. 2020, algorithm 2, with the predicted x_0 clamped to [-1, 1] at every step, as the authors do.

    model: (x_t, t) -> eps_hat, in eval mode; diffusion: its tables on `device`; shape: (C, H, W) of one image;
    index: (B,) int64, which samples to draw; on_step: called with t = T-1, ..., 0 after each step.
    Returns x_0: (B, C, H, W) float32 in [-1, 1].

    x_T and every z_t are keyed by (seed, sample, t): a sample is the same in whatever batch it is drawn, up to the
    network's own rounding.
    """
    index = index.to(device)
    x = keyed_normal(seed, Stream.INITIAL, index, shape)
    for step in reversed(range(diffusion.timesteps)):
        t = torch.full_like(index, step)
        x0 = diffusion.predict_x0(x, t, model(x, t)).clamp(-1, 1)
        x = diffusion.posterior_mean(x0, x, t)
        if step > 0:
            z = keyed_normal(seed, Stream.ANCESTRAL, index, shape, sub=step)
            sigma = diffusion.posterior_variance(t, variance).sqrt()
            x = x + sigma[:, None, None, None] * z
        if on_step is not None:
            on_step(step)
    return x
