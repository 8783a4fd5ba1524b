"""The outcome of a step, the same on all ranks, and its asynchronous copy from the device to the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.data.stream.stream import BatchLayout
from trainer.diffusion.contract import Losses
from trainer.telemetry.meters import STEP_SUMS, StepFigures
from trainer.telemetry.noise_scale import GradientNoise

PHASE_VALUES = 3 + STEP_SUMS


@dataclass(frozen=True, kw_only=True)
class NetworkVerdict:
    """Outcome of a phase for the network that it trains: mean loss of the global batch, gradient norm before clipping,
    values for the log, and the losses of this rank's images, on the device.
    """

    network: str
    loss: float
    grad_norm: float
    figures: StepFigures
    losses: Losses

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


@dataclass(frozen=True, kw_only=True)
class PhaseReport:
    """A phase's part of a verdict, before it is read.

    values: (PHASE_VALUES,) float32, on the device: the gradient norm before clipping, and, summed over the ranks,
    loss / world_size, |g|^2 of the gradient of `small_batch` images, `step_sums`. network: that it trains. small_batch:
    None where no such gradient is measured (gradient_noise.py). losses: of this rank's images.
    """

    values: torch.Tensor
    network: str
    layout: BatchLayout
    small_batch: int | None
    bound_terms: int | None
    losses: Losses

    def verdict(self, values: Sequence[float]) -> NetworkVerdict:
        """The verdict, from `values` as they were copied to the host."""
        grad_norm, loss, small_square, *sums = values
        noise = None
        if self.small_batch is not None:
            noise = GradientNoise.estimate(
                small_square=small_square / self.layout.world_size,
                small_batch=self.small_batch,
                large_square=grad_norm**2,
                large_batch=self.layout.global_batch,
            )
        figures = StepFigures.read(
            sums, global_batch=self.layout.global_batch, bound_terms=self.bound_terms, noise=noise
        )
        return NetworkVerdict(network=self.network, loss=loss, grad_norm=grad_norm, figures=figures, losses=self.losses)


class PendingVerdict:
    """A verdict being copied from the device; reading it waits for the step, so read it after queueing the next one.

    flags: (3,) float32, on the device: the numbers of ranks that are to stop, write, copy. phases: in their order.
    """

    def __init__(self, flags: torch.Tensor, phases: Sequence[PhaseReport]) -> None:
        self._phases = phases
        report = torch.cat([flags, *(phase.values for phase in phases)])
        self._arrived = torch.cuda.Event() if report.is_cuda else None
        self._report = report.to("cpu", non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Verdict:
        """Wait for the copy; returns the verdict."""
        if self._arrived is not None:
            self._arrived.synchronize()
        stop_requests, writing, copying, *values = self._report.tolist()
        return Verdict(
            networks=[
                phase.verdict(values[number * PHASE_VALUES : (number + 1) * PHASE_VALUES])
                for number, phase in enumerate(self._phases)
            ],
            stop_requests=round(stop_requests),
            writing=round(writing),
            copying=round(copying),
        )
