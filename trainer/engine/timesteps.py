"""The timesteps that a step trains on: keyed by the image's position, and, if wanted, drawn where the loss is large."""

from typing import Protocol

import torch
import torch.distributed as dist

from trainer.diffusion.noise import keyed_timesteps
from trainer.diffusion.timesteps import ImportanceSampling, timestep_uniform


class Timesteps(Protocol):
    """Where t comes from, and what is remembered of the losses it led to."""

    def draw(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """t, (B,) int64, and the weight of its loss, (B,) float32 or None for 1.

        position: (B,) int64, of the images that are noised.
        """

    def record(self, t: torch.Tensor, losses: torch.Tensor, *, found_inf: torch.Tensor) -> None:
        """Learn from the unweighted losses of this rank's part of a global batch; all ranks call it.

        t, losses: (global_batch / world_size,); found_inf: a scalar, 1 where the step is skipped and nothing learned.
        """

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state, for checkpoints; load by copying into these."""


class UniformTimesteps:
    """Algorithm 1: every t equally often. Has no state."""

    def __init__(self, seed: int, timesteps: int) -> None:
        self.seed = seed
        self.timesteps = timesteps

    def draw(self, position: torch.Tensor) -> tuple[torch.Tensor, None]:
        """See `Timesteps`."""
        return keyed_timesteps(self.seed, position, self.timesteps), None

    def record(self, t: torch.Tensor, losses: torch.Tensor, *, found_inf: torch.Tensor) -> None:
        """Nothing is learned."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """None."""
        return {}


class ImportanceTimesteps:
    """Nichol and Dhariwal 2021, section 3.3. The losses of all ranks go into one memory, alike on every rank.

    They are recorded in the order of the images' positions, so the memory does not depend on the number of ranks.
    """

    def __init__(self, seed: int, sampling: ImportanceSampling) -> None:
        self.seed = seed
        self.sampling = sampling

    def draw(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Timesteps`."""
        return self.sampling.draw(timestep_uniform(self.seed, position))

    def record(self, t: torch.Tensor, losses: torch.Tensor, *, found_inf: torch.Tensor) -> None:
        """See `Timesteps`."""
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        self.sampling.record(_of_all_ranks(t), _of_all_ranks(losses))
        for name, tensor in self.tensors().items():
            tensor.copy_(torch.where(found_inf.bool(), before[name], tensor))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The last losses of every t, (T, 10) float32, and how many there have been, (T,) int64."""
        return {"history": self.sampling.history, "counts": self.sampling.counts}


def _of_all_ranks(part: torch.Tensor) -> torch.Tensor:
    """The ranks' parts of a global batch, which are contiguous in position, one behind another."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part
    whole = part.new_empty(dist.get_world_size() * len(part))
    dist.all_gather_into_tensor(whole, part.contiguous())
    return whole
