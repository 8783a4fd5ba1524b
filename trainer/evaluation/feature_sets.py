"""Features of many images in a folder: the ranks divide the work, which is resumable after a kill."""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainer.drawing.work import Task, Work
from trainer.engine.processes.collectives import each_its_own, sum_over_ranks, together
from trainer.errors import DataError
from trainer.features.frechet import Gaussian, Moments
from trainer.features.networks import FeatureNetwork, extract
from trainer.signals import StopRequest
from trainer.telemetry.files import write_whole


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSet:
    """Features and logits of the images 0..N-1, in batches; `name` describes the images in messages."""

    name: str
    work: Work
    batches: list[range]

    @property
    def count(self) -> int:
        """N."""
        return self.batches[-1].stop

    def fill(
        self,
        images: Callable[[range, Callable[[int], object]], torch.Tensor],
        network: FeatureNetwork,
        task: Task,
        stop: StopRequest,
    ) -> bool:
        """Compute what is missing, of images (B, C, H, W) uint8 by their indices; the ranks divide them.

        images: its second argument is called with the number of the task's units that have advanced. Returns False
        after a request to stop, which is reported. Collective. Raises `task.kind` on all ranks where an image cannot be
        read or a result cannot be written.
        """
        device = self.work.accelerator.device

        def make(numbers: range, advance: Callable[[int], object]) -> None:
            features, logits = extract(network, images(numbers, advance).to(device))
            self.work.save(numbers, {"features": features.cpu().numpy(), "logits": logits.cpu().numpy()})

        return self.work.carry_out(lambda: self.work.missing(self.batches), make, task, stop)

    def has_moments(self) -> bool:
        """Whether the moments for `gaussian` are stored, so that features are not needed. Collective."""
        return together(f"{self._moments}: cannot be read", self._moments.exists, only_rank=0)[0]

    def gaussian(self) -> Gaussian:
        """Mean and covariance of the features, summed in float64; the ranks divide the batches. Collective.

        They are stored in moments-n-N.npz in the format of pytorch-fid: mu (D,), sigma (D, D).
        """
        if not self.has_moments():
            gaussian = self._sum_up()
            together(f"{self._moments}: cannot be written", lambda: self._save(gaussian), only_rank=0)
            return gaussian
        return each_its_own(f"{self._moments}: cannot be read", self._load)

    def rows(self, kind: str) -> torch.Tensor:
        """All "features" or "logits", (N, D) float32, on every rank's device. Collective."""

        def load() -> torch.Tensor:
            parts = [self.work.load(numbers)[kind] for numbers in self.batches]
            return torch.from_numpy(np.concatenate(parts)).to(self.work.accelerator.device)

        return each_its_own(f"{self.work.folder}: cannot be read", load, kind=DataError)

    @property
    def _moments(self) -> Path:
        return self.work.folder / f"moments-n-{self.count}.npz"

    def _sum_up(self) -> Gaussian:
        accelerator = self.work.accelerator

        def add_up() -> Moments:
            dimensions = self.work.load(self.batches[0])["features"].shape[1]
            moments = Moments.of(torch.empty(0, dimensions, device=accelerator.device))
            for numbers in self.batches[accelerator.process_index :: accelerator.num_processes]:
                moments += Moments.of(torch.from_numpy(self.work.load(numbers)["features"]).to(accelerator.device))
            return moments

        share = each_its_own(f"{self.work.folder}: cannot be read", add_up, kind=DataError)
        total, outer = sum_over_ranks(share.total), sum_over_ranks(share.outer)
        return Moments(count=self.count, total=total, outer=outer).gaussian()

    def _save(self, gaussian: Gaussian) -> None:
        content = io.BytesIO()
        np.savez(content, mu=gaussian.mean.cpu().numpy(), sigma=gaussian.covariance.cpu().numpy())
        write_whole(self._moments, content.getvalue())

    def _load(self) -> Gaussian:
        try:
            with np.load(self._moments, allow_pickle=False) as stored:
                mean, covariance = (torch.from_numpy(stored[name]) for name in ("mu", "sigma"))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{self._moments}: damaged ({error}); delete it and run this again") from error
        return Gaussian(mean=mean, covariance=covariance).to(self.work.accelerator.device)
