"""How the timesteps to train on are drawn: all equally often, or where the loss is large."""

import torch
from torch import Tensor
from typing_extensions import override

from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.diffusion.time_distribution import TimeDistribution

HISTORY = 10  # last losses of each timestep
UNIFORM_SHARE = 0.001


class UniformTimesteps(TimeDistribution):
    """Ho et al. 2020, algorithm 1: each t of 0..T-1 has the probability 1 / T, to within 2^-32."""

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps

    @override
    def draw(self, noise: KeyedNoise) -> tuple[Tensor, None]:
        return (noise.bits("t") * self.timesteps) >> 32, None


def timestep_uniform(noise: KeyedNoise) -> Tensor:
    """A random number for each sample, from which its t follows: (B,) float64, a multiple of 2^-32 in [0, 1).

    float64, since the rarest t has a probability of 0.001 / T, of which float32 would keep two digits.
    """
    return noise.bits("t").double() * 2.0**-32


class ImportanceSampling(TimeDistribution):
    """Nichol and Dhariwal 2021, section 3.3: t in proportion to sqrt(E[L_t^2]), and weights by which the mean of the
    losses stays what it was.

    Its state is two tensors, which every rank must hold alike and a checkpoint must keep: `history` (T, 10) float32,
    the last losses of each timestep, oldest first; `counts` (T,) int64, how many of them there are. They are changed
    in place.
    """

    def __init__(self, timesteps: int, device: torch.device | str = "cpu") -> None:
        self.history = torch.zeros(timesteps, HISTORY, device=device)
        self.counts = torch.zeros(timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """p(t): (T,) float64, its sum 1.

        Uniform until every timestep has its ten losses; then 0.999 sqrt(mean of their squares), normalised, plus
        0.001 / T.
        """
        timesteps = len(self.counts)
        root_mean_square = self.history.double().square().mean(dim=1).sqrt()
        weighted = (1 - UNIFORM_SHARE) * root_mean_square / root_mean_square.sum() + UNIFORM_SHARE / timesteps
        uniform = torch.full_like(weighted, 1 / timesteps)
        return torch.where((self.counts == HISTORY).all(), weighted, uniform)

    def draw(self, noise: KeyedNoise) -> tuple[Tensor, Tensor]:
        """`quantiles` of the numbers that `noise` has for "t"."""
        return self.quantiles(timestep_uniform(noise))

    def tensors(self) -> dict[str, Tensor]:
        """The last losses of every t, (T, 10) float32, and how many of them there are, (T,) int64."""
        return {"history": self.history, "counts": self.counts}

    def quantiles(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """t and the weight of its loss for each sample, from numbers in [0, 1): see `timestep_uniform`.

        uniform: (B,) floating. Returns t: (B,) int64, the inverse of the distribution function at `uniform`; weight:
        (B,) float32, 1 / (T p(t)).
        """
        probabilities = self.probabilities()
        last = len(probabilities) - 1
        t = torch.searchsorted(probabilities.cumsum(dim=0), uniform.double(), right=True).clamp(max=last)
        return t, (1 / (len(probabilities) * probabilities[t])).float()

    @torch.no_grad()
    def record(self, t: Tensor, losses: Tensor) -> None:
        """Take in the unweighted losses of one global batch, in the order of its positions.

        t: (B,) int64; losses: (B,), finite. The state is afterwards as if they had come one by one, also where a
        timestep comes more than once. Ranks that record the same tensors stay alike bit for bit.
        """
        order = t.argsort(stable=True)
        sorted_t = t[order]
        timesteps = torch.arange(len(self.counts), device=t.device)
        first = torch.searchsorted(sorted_t, timesteps)
        arrived = torch.searchsorted(sorted_t, timesteps, right=True) - first
        dropped = (self.counts + arrived - HISTORY).clamp(min=0)  # so many of the oldest have no place

        slots = torch.arange(HISTORY, device=t.device) + dropped[:, None]
        kept = self.history.gather(1, slots.clamp(max=HISTORY - 1)).where(slots < HISTORY, 0)

        turn = torch.arange(len(t), device=t.device) - first[sorted_t]  # 0 for the first of its timestep, ...
        slot = self.counts[sorted_t] + turn - dropped[sorted_t]
        nowhere = kept.numel()  # a cell at the end for those that later ones of the same batch push out again
        cell = torch.where(slot >= 0, sorted_t * HISTORY + slot, nowhere)
        cells = torch.cat((kept.flatten(), kept.new_zeros(1)))
        cells[cell] = losses[order].to(cells.dtype)
        self.history.copy_(cells[:-1].view_as(kept))
        self.counts.copy_((self.counts + arrived).clamp(max=HISTORY))
