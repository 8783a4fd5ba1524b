"""What the training steps say: summed on the device in a step, and by the host from one log line to the next.

The sums of a step travel with its verdict, which all ranks exchange and read anyway (trainer/engine/verdict.py): a
meter adds no exchange, no copy and no wait. The sums of an interval are plain numbers, alike on all ranks and part of
the state, so a log line says the same whether the run was interrupted in the middle of its interval or not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from trainer.diffusion.contract import Losses
from trainer.telemetry.noise_scale import GradientNoise

QUARTILES = 4
STEP_SUMS = 2 * QUARTILES + 1
_SMOOTHING = 0.99  # decay a step


def step_sums(losses: Losses, *, timesteps: int) -> Tensor:
    """What a rank's images of a step add up to: (9,) float32, to be summed over ranks and read by `StepFigures`.

    losses: of these images, t in [0, timesteps). Nothing waits for the device, and sums are taken in one order: they
    are the same bits every time.
    """
    weight = losses.weight
    if weight is None:
        weight = torch.ones_like(losses.loss)
    quartile = torch.arange(QUARTILES, device=losses.t.device)
    member = weight * (losses.t * QUARTILES // timesteps == quartile[:, None])  # (4, B)
    bound = (weight * losses.bound).sum(dim=0, keepdim=True)
    return torch.cat([(member * losses.loss).sum(dim=1), member.sum(dim=1), bound])


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """A step of all ranks: by quarter of the timesteps the summed losses and how many images they are of (both weighted
    by 1 / (T p(t))), the bound without its prior in bits per dimension, and the gradient's noise where it is measured.
    """

    quartile_losses: Sequence[float]
    quartile_images: Sequence[float]
    bound_bits: float
    noise: GradientNoise | None

    @classmethod
    def read(cls, sums: Sequence[float], *, global_batch: int, timesteps: int, noise: GradientNoise | None) -> Self:
        """From `step_sums` of all ranks. The bound is a sum over t, which the images sample: T x their mean."""
        *quartiles, bound = sums
        return cls(
            quartile_losses=quartiles[:QUARTILES],
            quartile_images=quartiles[QUARTILES:],
            bound_bits=timesteps * bound / global_batch,
            noise=noise,
        )


@dataclass
class Meters:
    """What is still to be logged of the steps that were applied, and averages over all of them. Part of the state."""

    steps: int = 0
    loss: float = 0.0
    bound_bits: float = 0.0
    quartile_losses: list[float] = field(default_factory=lambda: [0.0] * QUARTILES)
    quartile_images: list[float] = field(default_factory=lambda: [0.0] * QUARTILES)
    grad_norm: float = 0.0
    grad_norm_max: float = 0.0
    smoothed_loss: float = 0.0
    smoothed_weight: float = 0.0  # of all steps in `smoothed_loss`: 1 - 0.99^n
    noise_steps: int = 0  # of the interval, that measured the two below
    noise_square: float = 0.0  # smoothed likewise
    noise_variance: float = 0.0

    def add(self, *, loss: float, grad_norm: float, figures: StepFigures) -> None:
        """Count a step that was applied; `loss` and `grad_norm` are those of its global batch."""
        self.steps += 1
        self.loss += loss
        self.bound_bits += figures.bound_bits
        for number in range(QUARTILES):
            self.quartile_losses[number] += figures.quartile_losses[number]
            self.quartile_images[number] += figures.quartile_images[number]
        self.grad_norm = grad_norm
        self.grad_norm_max = max(self.grad_norm_max, grad_norm)
        self.smoothed_loss = _SMOOTHING * self.smoothed_loss + (1 - _SMOOTHING) * loss
        self.smoothed_weight = _SMOOTHING * self.smoothed_weight + (1 - _SMOOTHING)
        if figures.noise is not None:
            square, variance = figures.noise
            self.noise_steps += 1
            self.noise_square = _SMOOTHING * self.noise_square + (1 - _SMOOTHING) * square
            self.noise_variance = _SMOOTHING * self.noise_variance + (1 - _SMOOTHING) * variance

    def take(self) -> dict[str, float]:
        """Scalars of the interval, which ends here; none where no step was applied in it."""
        if not self.steps:
            return {}
        values = {
            "train/loss": self.loss / self.steps,
            "train/loss_smoothed": self.smoothed_loss / self.smoothed_weight,
            "train/bound_bits_per_dim": self.bound_bits / self.steps,
            "train/grad_norm": self.grad_norm,
            "train/grad_norm_max": self.grad_norm_max,
        }
        for number, (loss, images) in enumerate(zip(self.quartile_losses, self.quartile_images, strict=True), start=1):
            if images:
                values[f"train/loss_q{number}"] = loss / images
        if self.noise_steps and self.noise_square > 0 and self.noise_variance > 0:  # negative: only noise so far
            values["train/noise_scale"] = self.noise_variance / self.noise_square
        self._begin_interval()
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _begin_interval(self) -> None:
        self.steps, self.noise_steps = 0, 0
        self.loss, self.bound_bits, self.grad_norm_max = 0.0, 0.0, 0.0
        self.quartile_losses, self.quartile_images = [0.0] * QUARTILES, [0.0] * QUARTILES

    def state(self) -> dict[str, Any]:
        """As plain JSON, exactly."""
        return asdict(self)

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> Self:
        """The inverse of `state`; of a checkpoint that lacks a meter, that one starts anew."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})
