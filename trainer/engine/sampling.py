"""Sampling over all processes: for a given seed, the images do not depend on the number of processes."""

from collections.abc import Callable, Iterator

import torch

from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.ddpm.samplers import Sampler
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.signals import StopRequest
from trainer.telemetry.pictures import Pixels, to_uint8


def batches_of(count: int, batch: int) -> list[range]:
    """The indices 0..count-1 in batches of `batch`.

    The batches do not depend on the number of ranks: a network's rounding may depend on the batch size.
    """
    return [range(first, min(first + batch, count)) for first in range(0, count, batch)]


def sample(
    reverse: ReverseProcess,
    sampler: Sampler,
    *,
    shape: tuple[int, int, int],
    device: torch.device,
    batches: list[range],
    seed: int,
    on_step: Callable[[int], None] | None = None,
    stop: StopRequest | None = None,
) -> Iterator[tuple[range, Pixels]]:
    """Draw the samples of each batch of indices; yields the indices and (B, C, H, W) uint8 images.

    `on_step` is called after each denoising step with the number of images that advanced. A request to `stop` ends the
    iteration at the next step.
    """
    for numbers in batches:
        noise = KeyedNoise.sampling(seed, torch.tensor(list(numbers), device=device))
        x = noise.normal("initial", shape)
        with torch.no_grad():
            for state in sampler(reverse, x, noise=noise):
                x = state.x
                if on_step is not None:
                    on_step(len(numbers))
                if stop:
                    return
        yield numbers, to_uint8(x).cpu().numpy()
