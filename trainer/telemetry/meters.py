"""Meters: figures of training steps, summed on the device within a step and on the host over a log interval.

The sums of a step are part of its verdict, which all ranks exchange and read anyway (engine/step/step_report.py), so
meters add no communication, copy or synchronisation. The sums of an interval are plain numbers, equal on all ranks and
part of the state, so a log line does not depend on whether the run was interrupted within its interval.
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
_SMOOTHING = 0.99  # EMA decay per step


def step_sums(losses: Losses) -> Tensor:
    """Sums over the losses of this rank's images of a step: (9,) float32, to be summed over ranks and read by
    `StepFigures`.

    No synchronisation with the device; the order of summation is fixed, so results are reproducible bit for bit.
    """
    weight = losses.weight
    if weight is None:
        weight = torch.ones_like(losses.loss)
    quartile = torch.arange(QUARTILES, device=losses.level.device)
    member = weight * (quartile_of(losses.level) == quartile[:, None])  # (4, B)
    bound = weight * losses.bound if losses.bound is not None else torch.zeros_like(weight)
    return torch.cat([(member * losses.loss).sum(dim=1), member.sum(dim=1), bound.sum(dim=0, keepdim=True)])


def quartile_of(level: Tensor) -> Tensor:
    """The quarter of the noise levels, 0 to 3, for `Losses.level`: int64 of the same shape."""
    return (level * QUARTILES).long()


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Figures of a step over all ranks: by quarter of the noise levels the summed losses and the number of images
    (both weighted by `Losses.weight`), the variational bound without its prior term in bits per dimension, None where
    the family has none, and the gradient noise where measured.
    """

    quartile_losses: Sequence[float]
    quartile_images: Sequence[float]
    bound_bits: float | None
    noise: GradientNoise | None

    @classmethod
    def read(
        cls, sums: Sequence[float], *, global_batch: int, bound_terms: int | None, noise: GradientNoise | None
    ) -> Self:
        """From `step_sums` of all ranks. The bound is a sum of terms, estimated as their number times the mean."""
        *quartiles, bound = sums
        return cls(
            quartile_losses=quartiles[:QUARTILES],
            quartile_images=quartiles[QUARTILES:],
            bound_bits=bound_terms * bound / global_batch if bound_terms is not None else None,
            noise=noise,
        )


@dataclass
class Meters:
    """Sums over the steps applied since the last log line, and running averages. Part of the state."""

    steps: int = 0
    loss: float = 0.0
    bound_bits: float = 0.0  # 0 in all steps where the family has no bound
    quartile_losses: list[float] = field(default_factory=lambda: [0.0] * QUARTILES)
    quartile_images: list[float] = field(default_factory=lambda: [0.0] * QUARTILES)
    grad_norm: float = 0.0
    grad_norm_max: float = 0.0
    smoothed_loss: float = 0.0
    smoothed_weight: float = 0.0  # total weight in `smoothed_loss`: 1 - 0.99^n after n steps
    noise_steps: int = 0  # steps of the interval in which the gradient noise was measured
    noise_square: float = 0.0  # a running average, as the next
    noise_variance: float = 0.0

    def add(self, *, loss: float, grad_norm: float, figures: StepFigures) -> None:
        """Add a step that was applied; `loss` and `grad_norm` are those of its global batch."""
        self.steps += 1
        self.loss += loss
        self.bound_bits += figures.bound_bits or 0.0
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
        """Scalars of the interval, and start the next one; empty where no step was applied."""
        if not self.steps:
            return {}
        values = {
            "train/loss": self.loss / self.steps,
            "train/loss_smoothed": self.smoothed_loss / self.smoothed_weight,
            "train/grad_norm": self.grad_norm,
            "train/grad_norm_max": self.grad_norm_max,
        }
        if self.bound_bits:
            values["train/bound_bits_per_dim"] = self.bound_bits / self.steps
        for number, (loss, images) in enumerate(zip(self.quartile_losses, self.quartile_images, strict=True), start=1):
            if images:
                values[f"train/loss_q{number}"] = loss / images
        if self.noise_steps and self.noise_square > 0 and self.noise_variance > 0:  # negative where noise dominates
            values["train/noise_scale"] = self.noise_variance / self.noise_square
        self._begin_interval()
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _begin_interval(self) -> None:
        self.steps, self.noise_steps = 0, 0
        self.loss, self.bound_bits, self.grad_norm_max = 0.0, 0.0, 0.0
        self.quartile_losses, self.quartile_images = [0.0] * QUARTILES, [0.0] * QUARTILES

    def state(self) -> dict[str, Any]:
        """The state as plain JSON, exact."""
        return asdict(self)

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> Self:
        """The inverse of `state`; a meter that the saved state lacks starts at its default."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})
