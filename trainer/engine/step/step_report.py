"""The outcome of a step, the same on all ranks, and its asynchronous copy from the device to the host."""

import math
from dataclasses import dataclass

import torch

from trainer.telemetry.meters import StepFigures
from trainer.telemetry.noise_scale import GradientNoise


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of a step: mean loss of the global batch, gradient norm before clipping, how many ranks have a request to
    stop, are writing a checkpoint, are uploading one to the mirror, and values for the log.
    """

    loss: float
    grad_norm: float
    stop_requests: int
    writing: int
    copying: int
    figures: StepFigures

    @property
    def finite(self) -> bool:
        """Whether the step was applied; it is skipped where loss or gradient is NaN or infinite on any rank."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """Sizes that the sums in a report refer to: `images` of a step on `world_size` ranks; `small`, the number of images
    in the gradient whose squared norm each rank reports, None where none is measured (gradient_noise.py); and the
    objective's `bound_terms`.
    """

    world_size: int
    images: int
    small: int | None
    bound_terms: int | None


class PendingVerdict:
    """A verdict being copied from the device; reading it waits for the step, so read it after queueing the next one.

    report: float32, on the device: the gradient norm before clipping, and, summed over the ranks: loss / world_size;
    whether to stop, writing, copying (1 or 0); |g|^2 of the gradient of `StepBatches.small` images; `step_sums`.
    """

    def __init__(self, report: torch.Tensor, batches: StepBatches) -> None:
        self._batches = batches
        self._arrived = torch.cuda.Event() if report.is_cuda else None
        self._report = report.to("cpu", non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Verdict:
        """Wait for the copy; returns the verdict."""
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
                bound_terms=self._batches.bound_terms,
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
