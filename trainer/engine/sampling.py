"""Sampling over all processes: the same seed gives the same images on any number of them."""

from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import nn

from trainer.config import Config
from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.reverse import ReverseProcess
from trainer.diffusion.samplers import SamplingStep, ancestral, initial_noise
from trainer.diffusion.samplers import sample as run_chain
from trainer.telemetry.pictures import Pixels, to_uint8


def share_of(count: int, batch: int, rank: int, world_size: int) -> list[range]:
    """The batches of sample numbers 0..count-1 that fall to a rank.

    With one `batch` they are cut the same way for any number of ranks: the network's rounding may depend on its size.
    """
    batches = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
    return batches[rank::world_size]


def sample(
    network: nn.Module,
    *,
    config: Config,
    diffusion: GaussianDiffusion,
    accelerator: Accelerator,
    batches: list[range],
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[range, Pixels]]:
    """Draw the samples of each batch of numbers; yields the numbers and (B, C, H, W) uint8 images.

    `on_step` is called after each denoising step with the number of images that advanced.
    """
    shape = (config.model.channels, config.model.image_size, config.model.image_size)
    reverse = ReverseProcess(network, diffusion, variance=config.diffusion.variance)
    for numbers in batches:

        def advance(_: SamplingStep, images: int = len(numbers)) -> None:
            if on_step is not None:
                on_step(images)

        index = torch.tensor(list(numbers), device=accelerator.device)
        x = initial_noise(index, seed, shape)
        with accelerator.autocast():
            x0 = run_chain(ancestral(reverse, x, index=index, seed=seed), advance)
        yield numbers, to_uint8(x0).cpu().numpy()
