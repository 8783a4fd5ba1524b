"""Drawing a batch of samples: for a given seed, the images do not depend on the number of processes."""

from collections.abc import Callable

import torch

from trainer.diffusion.contract import Denoiser
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.sampling.request import SamplingRequest
from trainer.sampling.steps import last_of
from trainer.telemetry.pictures import Pixels, to_uint8


@torch.no_grad()
def draw_batch(
    request: SamplingRequest,
    denoiser: Denoiser,
    numbers: range,
    *,
    shape: tuple[int, int, int],
    on_step: Callable[[int], object] | None = None,
) -> Pixels:
    """The samples of these numbers: (B, C, H, W) uint8.

    denoiser: visits the request's timesteps; shape: (C, H, W); on_step: called after each denoising step with the
    number of images that advanced. What it raises ends the sampling.
    """
    device = denoiser.diffusion.original_timesteps.device
    noise = KeyedNoise.sampling(request.seed, torch.tensor(list(numbers), device=device))
    chain = request.make_sampler()(denoiser, noise.normal("initial", shape), noise=noise)
    x = last_of(chain, None if on_step is None else lambda _: on_step(len(numbers)))
    return to_uint8(x).cpu().numpy()
