"""The outcome of a step, the same on all ranks, and its asynchronous copy from the device to the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.telemetry.meters import STEP_SUMS, StepFigures
from trainer.telemetry.noise_scale import GradientNoise

_FLAGS = 3
PHASE_VALUES = 3 + STEP_SUMS


@dataclass(frozen=True, kw_only=True)
class NetworkVerdict:
    """Outcome of a phase for the network that it trains: mean loss of the global batch, gradient norm before clipping,
    and values for the log.
    """

    network: str
    loss: float
    grad_norm: float
    figures: StepFigures

    @property
    def finite(self) -> bool:
        """Whether the network was updated; it is not where its loss or gradient is NaN or infinite on any rank."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of a step: of each of its phases, and how many ranks have a request to stop, are writing a checkpoint,
    are uploading one to the mirror.
    """

    networks: Sequence[NetworkVerdict]
    stop_requests: int
    writing: int
    copying: int

    @property
    def finite(self) -> bool:
        """Whether every network was updated."""
        return all(each.finite for each in self.networks)


@dataclass(frozen=True, kw_only=True)
class PhaseBatches:
    """What the sums in a phase's report refer to: the `network` that it trains; `images` of a step on `world_size`
    ranks; `small`, the number of images in the gradient whose squared norm each rank reports, None where none is
    measured (gradient_noise.py); and the objective's `bound_terms`.
    """

    network: str
    world_size: int
    images: int
    small: int | None
    bound_terms: int | None


class PendingVerdict:
    """A verdict being copied from the device; reading it waits for the step, so read it after queueing the next one.

    report: float32, on the device: summed over the ranks whether to stop, writing, copying (1 or 0); then for each
    phase the gradient norm before clipping, and, summed over the ranks, loss / world_size, |g|^2 of the gradient of
    `PhaseBatches.small` images, `step_sums`.
    """

    def __init__(self, report: torch.Tensor, phases: Sequence[PhaseBatches]) -> None:
        self._phases = phases
        self._arrived = torch.cuda.Event() if report.is_cuda else None
        self._report = report.to("cpu", non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Verdict:
        """Wait for the copy; returns the verdict."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values = self._report.tolist()
        stop_requests, writing, copying = values[:_FLAGS]
        starts = range(_FLAGS, len(values), PHASE_VALUES)
        return Verdict(
            networks=[
                _of_network(values[start : start + PHASE_VALUES], batches)
                for start, batches in zip(starts, self._phases, strict=True)
            ],
            stop_requests=round(stop_requests),
            writing=round(writing),
            copying=round(copying),
        )


def _of_network(values: Sequence[float], batches: PhaseBatches) -> NetworkVerdict:
    grad_norm, loss, small_square, *sums = values
    noise = None
    if batches.small is not None:
        noise = GradientNoise.estimate(
            small_square=small_square / batches.world_size,
            small_batch=batches.small,
            large_square=grad_norm**2,
            large_batch=batches.images,
        )
    return NetworkVerdict(
        network=batches.network,
        loss=loss,
        grad_norm=grad_norm,
        figures=StepFigures.read(sums, global_batch=batches.images, bound_terms=batches.bound_terms, noise=noise),
    )
