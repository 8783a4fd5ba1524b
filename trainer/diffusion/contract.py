"""What a family of diffusion models gives the trainer and what it gets: a batch in, a loss for each sample out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.diffusion.times import Times

Conditioning = Mapping[str, Tensor]
MODEL = "model"  # name of the network that every family has: the one that samples are drawn with


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples on a device.

    x: (B, C, H, W) float32 in [-1, 1]; position: (B,) int64, what the randomness of each sample is keyed by: its place
    among all images that a run consumes, or its id in the dataset where it is held out; cond: tensors of B rows that go
    to the network by these names.
    """

    x: Tensor
    position: Tensor
    cond: Conditioning = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What an objective computes of a batch; each (B,).

    t: the times that were drawn; level: float32, the share of all noise levels that lie below t, in [0, 1), by which
    losses are grouped in logs; loss: float32, with the gradient, not weighted; weight: float32, by which the mean of
    the losses estimates the mean over uniform t, None for 1; bound: float32 without a gradient, each sample's term of
    the variational bound in bits per dimension, None where the family has none.
    """

    t: Tensor
    level: Tensor
    loss: Tensor
    weight: Tensor | None
    bound: Tensor | None

    def mean(self) -> Tensor:
        """The weighted mean, (): what is minimised."""
        return (self.loss if self.weight is None else self.weight * self.loss).mean()

    def detach(self) -> Self:
        """The same numbers without the graph that made them."""
        return replace(self, loss=self.loss.detach())

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Of several batches of one objective, in their order."""
        weights = [part.weight for part in parts if part.weight is not None]
        bounds = [part.bound for part in parts if part.bound is not None]
        return cls(
            t=torch.cat([part.t for part in parts]),
            level=torch.cat([part.level for part in parts]),
            loss=torch.cat([part.loss for part in parts]),
            weight=torch.cat(weights) if weights else None,
            bound=torch.cat(bounds) if bounds else None,
        )


class Network(Protocol):
    """Maps noised samples (B, C, H, W) at times t (B,) to an output whose meaning is the family's."""

    def __call__(self, x: Tensor, t: Tensor, /, **cond: Tensor) -> Tensor:
        """x: (B, C, H, W); t: (B,); cond: tensors of B rows, by the names of `Batch.cond`."""


class Objective(Protocol):
    """The one place where t is drawn, samples are corrupted, the network predicts and the losses are computed.

    The training step, validation and the replay of a step all call it.
    """

    @property
    def times(self) -> Times:
        """How t is drawn in training."""

    @property
    def validation_times(self) -> Times:
        """How t is drawn in validation: not affected by what was recorded."""

    @property
    def bound_terms(self) -> int | None:
        """Number of terms of the variational bound, of which `Losses.bound` has one a sample; None without a bound."""

    def training_losses(
        self, network: Network, batch: Batch, noise: KeyedNoise, *, times: Times | None = None
    ) -> Losses:
        """The losses of a batch, a pure function of it, the network, the noise and what was recorded.

        times: how t is drawn, in place of the objective's own way.
        """

    def record(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses of a whole global batch, in the order of its positions: both (B,).

        Changes `tensors` in place, in the same way on every rank.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What it has recorded, by the names that checkpoints have; load by copying into these."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a training step, which trains one network; all phases of a step see the same global batch.

    trains: the network's name. losses: of all networks by name, a batch and its noise; it has to use every parameter
    of the network that it trains. The others compute, and pass gradients on, but get none.
    """

    trains: str
    losses: Callable[[Mapping[str, Network], Batch, KeyedNoise], Losses]


def one_phase(objective: Objective) -> tuple[Phase, ...]:
    """The plain step: the network "model" is trained by the objective's losses."""
    return (Phase(trains=MODEL, losses=lambda networks, *given: objective.training_losses(networks[MODEL], *given)),)
