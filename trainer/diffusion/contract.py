"""Interfaces between families of diffusion models, networks and samplers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.diffusion.time_distribution import TimeDistribution

Conditioning = Mapping[str, Tensor]
MODEL = "model"  # name of the network that every family has: the one that samples are drawn with


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples on a device.

    x: (B, C, H, W) float32 in [-1, 1]; position: (B,) int64, what the randomness of each sample is keyed by: its place
    among all images that a run consumes, or its id in the dataset where it is held out; cond: tensors of B rows that go
    to the network by these names, or that its output is compared with.
    """

    x: Tensor
    position: Tensor
    cond: Conditioning = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What an objective computes of a batch; each (B,).

    t: the times that were drawn. level: float32 in [0, 1), the fraction of the noise levels that lie below t; logs
    group losses by it. loss: float32, with its gradient, not weighted. weight: float32, None for 1; the mean of
    weight x loss estimates the mean loss over uniform t. bound: float32 without a gradient, each sample's term of the
    variational bound in bits per dimension, None where the family has none. figures: float32 without a gradient, by
    name what else validation logs the means of.
    """

    t: Tensor
    level: Tensor
    loss: Tensor
    weight: Tensor | None
    bound: Tensor | None
    figures: Mapping[str, Tensor] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """The weighted mean, (): what is minimised."""
        return (self.loss if self.weight is None else self.weight * self.loss).mean()

    def detach(self) -> Self:
        """The same numbers without the graph that made them."""
        return replace(self, loss=self.loss.detach())

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Of several batches of one objective, in their order."""
        figures = {name: torch.cat([part.figures[name] for part in parts]) for name in parts[0].figures}
        tensors = (each.name for each in fields(cls) if each.name != "figures")
        values = {name: [getattr(part, name) for part in parts] for name in tensors}
        joined: dict[str, Any] = {
            name: torch.cat(some) if some[0] is not None else None for name, some in values.items()
        }
        return cls(**joined, figures=figures)


class Network(Protocol):
    """Maps noised samples (B, C, H, W) at times t (B,) to an output whose meaning is the family's."""

    def __call__(self, x: Tensor, t: Tensor, /, **cond: Tensor) -> Tensor:
        """x: (B, C, H, W); t: (B,); cond: tensors of B rows, by the names of `Batch.cond`."""


class ForwardProcess(Protocol):
    """q(x_t | x_0) on the timesteps t = 0, ..., T-1 that a sampler visits; the noise grows with t."""

    @property
    def timesteps(self) -> int:
        """T."""

    @property
    def original_timesteps(self) -> Tensor:
        """(T,) int64: the timesteps of the chain that the network was trained on, of which these may be a part."""

    @property
    def betas(self) -> Tensor:
        """(T,) float32: 1 - abar_t / abar_{t-1}."""

    @property
    def abar64(self) -> Tensor:
        """(T,) float64, on the CPU: x_t is sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps."""

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t of x_0 and eps, (B, C, H, W) float32, and t, (B,) int64."""


@dataclass(frozen=True, kw_only=True)
class Prediction(ABC):
    """A denoiser's output at x_t; each (B, C, H, W) float32.

    x0: the estimate of x_0, which a denoiser does not clamp; eps: the noise that goes with it, so that
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; mean, log_variance: of p(x_{t-1} | x_t), whose mean at t = 0 is x_0.
    Whatever tensors a family adds have B rows, too.
    """

    x0: Tensor
    eps: Tensor
    mean: Tensor
    log_variance: Tensor

    @property
    def variance(self) -> Tensor:
        """Of p(x_{t-1} | x_t), (B, C, H, W): exp(log_variance), where a family has no other one at t = 0."""
        return self.log_variance.exp()

    @property
    def x0_of_mean(self) -> Tensor:
        """The estimate of x_0 that `mean` was made from: x0, unless guidance has moved the mean alone."""
        return self.x0

    def __getitem__(self, rows: slice) -> Self:
        """The prediction for these rows of the batch."""
        values: dict[str, Any] = {part.name: getattr(self, part.name) for part in fields(self)}
        some: dict[str, Any] = {n: v[rows] for n, v in values.items() if isinstance(v, Tensor | Prediction)}
        return replace(self, **some)

    @abstractmethod
    def with_x0(self, x0: Tensor) -> Self:
        """The prediction that another estimate of x_0 leads to, its variance unchanged: the only method of a family
        that guidance calls.
        """

    @abstractmethod
    def clipped(self) -> Self:
        """The prediction with x_0 clamped to [-1, 1]."""


class Denoiser(Protocol):
    """A network, its conditioning, and the meaning of its output: all that samplers and figures see of a trained model.

    A wrapper of denoisers that combines their predictions is a denoiser again, as in trainer/sampling/guidance.py.
    """

    @property
    def diffusion(self) -> ForwardProcess:
        """The timesteps that it may be called at."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        """Predict from x: (B, C, H, W) float32, at t: (B,) int64 of `diffusion`."""


@dataclass(frozen=True, kw_only=True)
class SamplingStep:
    """The result of a step of a sampler.

    t: the timestep, of the chain that is visited; original_t: the same timestep in the chain of the network; x: the
    images after the step, x_{t-1}, which at t = 0 are the samples (when inverting: x_t); x0: the estimate of the
    samples that the step used (Ho et al. 2020, section 4.3: progressive generation).
    """

    t: int
    original_t: int
    x: Tensor
    x0: Tensor


class Sampler(Protocol):
    """A way from noise to samples: yields a state after each step, the samples last.

    All its random numbers come from `noise`, by (sample, original timestep): so a sample does not depend on its batch,
    up to the network's rounding, and all samplers see the same noise at the same timestep.
    """

    def __call__(self, denoiser: Denoiser, x: Tensor, *, noise: KeyedNoise) -> Iterator[SamplingStep]:
        """x: (B, C, H, W) float32, `noise.normal("initial", (C, H, W))`; noise: `KeyedNoise.sampling` of B samples."""


class Objective(Protocol):
    """Draws t, corrupts samples, calls the network and computes the losses: for training, validation and replay alike.

    A class that inherits from this one records nothing unless it overrides `record` and `tensors`.

    times: how t is drawn in training; validation_times: how in validation, not affected by what was recorded;
    bound_terms: number of terms of the variational bound, of which `Losses.bound` has one a sample, None without one.
    """

    times: TimeDistribution
    validation_times: TimeDistribution
    bound_terms: int | None

    def training_losses(
        self, network: Network, batch: Batch, noise: KeyedNoise, *, times: TimeDistribution | None = None
    ) -> Losses:
        """The losses of a batch, a pure function of it, the network, the noise and what was recorded.

        times: how t is drawn, in place of the objective's own way.
        """

    def denoiser(self, network: Network, cond: Conditioning | None = None, *, respacing: str = "all") -> Denoiser:
        """What a network that was trained with this objective predicts, given the conditioning of a batch.

        respacing: which timesteps are visited. ValueError where it does not fit the family's.
        """

    def record(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses of a whole global batch, in the order of its positions: both (B,).

        Changes `tensors` in place, in the same way on every rank.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What it has recorded, by the names that checkpoints have; load by copying into these."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a training step, which trains one network; all phases of a step see the same global batch.

    trains: the network's name. losses: a function of all networks by name, a batch and its noise, which has to use
    every parameter of the network that it trains. Gradients flow through the other networks, but not into their
    parameters.
    """

    trains: str
    losses: Callable[[Mapping[str, Network], Batch, KeyedNoise], Losses]


def one_phase(objective: Objective) -> tuple[Phase, ...]:
    """The plain step: the network "model" is trained by the objective's losses."""
    return (Phase(trains=MODEL, losses=lambda networks, *given: objective.training_losses(networks[MODEL], *given)),)
