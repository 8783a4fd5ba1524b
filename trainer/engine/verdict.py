"""What all ranks know about a step, and how it comes from the device to the host without holding up either."""

import math
from dataclasses import dataclass

import torch

from trainer.telemetry.meters import StepFigures
from trainer.telemetry.noise_scale import GradientNoise


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all ranks know about a step: mean loss of the global batch, gradient norm before clipping, how many ranks
    are to stop, how many still write their part of a checkpoint, how many copy one elsewhere, and what is only logged.
    """

    loss: float
    grad_norm: float
    stop_requests: int
    writing: int
    copying: int
    figures: StepFigures

    @property
    def finite(self) -> bool:
        """Whether the step was applied; a NaN or infinity anywhere makes it a step that never was."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """What the sums in a report are of: `images` of a step on `world_size` ranks; `timesteps`, T; and `small`, how many
    images the gradient is of whose squared norm each rank reports, None where none does (gradient_squares.py).
    """

    world_size: int
    images: int
    small: int | None
    timesteps: int


class PendingVerdict:
    """A verdict on its way from the device; reading it waits for the step, so read it when the next one is queued.

    report: float32, on the device: the gradient's norm before clipping, and as sums over the ranks: loss / world_size;
    whether to stop, writing, copying (1 or 0); |g|^2 of the gradient of `StepBatches.small` images; `step_sums`.
    """

    def __init__(self, report: torch.Tensor, batches: StepBatches) -> None:
        self._batches = batches
        self._arrived = torch.cuda.Event() if report.is_cuda else None
        self._report = report.to("cpu", non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Verdict:
        """Wait and read."""
        if self._arrived is not None:
            self._arrived.synchronize()
        grad_norm, loss, stop_requests, writing, copying, small_square, *sums = self._report.tolist()
        return Verdict(
            loss=loss,
            grad_norm=grad_norm,
            stop_requests=round(stop_requests),
            writing=round(writing),
            copying=round(copying),
            figures=StepFigures.read(
                sums,
                global_batch=self._batches.images,
                timesteps=self._batches.timesteps,
                noise=self._noise(grad_norm, small_square),
            ),
        )

    def _noise(self, grad_norm: float, small_square: float) -> GradientNoise | None:
        if self._batches.small is None:
            return None
        return GradientNoise.estimate(
            small_square=small_square / self._batches.world_size,
            small_batch=self._batches.small,
            large_square=grad_norm**2,
            large_batch=self._batches.images,
        )
