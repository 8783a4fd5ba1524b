"""What samplers share: the timesteps that they go down, and how a chain of steps is run to its end."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from trainer.diffusion.contract import ForwardProcess, SamplingStep


def last_of(chain: Iterable[SamplingStep], on_step: Callable[[SamplingStep], object] | None = None) -> Tensor:
    """Run a chain to its end; returns the images after its last step. `on_step` is called with every step."""
    last = None
    for last in chain:
        if on_step is not None:
            on_step(last)
    if last is None:
        raise ValueError("chain: must have a step")
    return last.x


def descending(diffusion: ForwardProcess, index: Tensor, start: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """t = start, ..., 0 (start: by default T-1) with its original timestep, and t for each sample: (B,) like `index`.

    ValueError for a start that is no timestep of the chain.
    """
    start = diffusion.timesteps - 1 if start is None else start
    if not 0 <= start < diffusion.timesteps:
        raise ValueError(f"start={start}: must be a timestep of the chain, 0 to {diffusion.timesteps - 1}")
    originals = diffusion.original_timesteps.tolist()  # once, since every access synchronises with the device
    for step in range(start, -1, -1):
        yield step, originals[step], torch.full_like(index, step)


def abar_at(diffusion: ForwardProcess, step: int) -> float:
    """abar_t, and 1 for the samples themselves at t = -1."""
    return diffusion.abar64[step].item() if step >= 0 else 1.0
