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
from trainer.features.networks import FeatureKind, FeatureNetwork, extract
from trainer.signals import StopRequest
from trainer.telemetry.files import write_whole


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSet:
    """What a network gives of the images 0..N-1, in batches; `name` describes the images in messages."""

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
        kind: FeatureKind = "features",
    ) -> bool:
        """Compute the batches without a result of this kind, of images (B, C, H, W) uint8 by their indices; the ranks
        divide them.

        images: its second argument is called with the number of the task's units that have advanced. Returns False
        after a request to stop, which is reported. Collective. Raises `task.kind` on all ranks where an image cannot be
        read or a result cannot be written.
        """
        device = self.work.accelerator.device

        def make(numbers: range, advance: Callable[[int], object]) -> None:
            found = extract(network, images(numbers, advance).to(device))
            self.work.save(numbers, {name: values.cpu().numpy() for name, values in found.items()})

        def is_done(numbers: range) -> bool:
            return self.work.holds(numbers, kind)

        return self.work.carry_out(lambda: self.work.missing(self.batches, is_done), make, task, stop)

    def has_moments(self, kind: FeatureKind = "features") -> bool:
        """Whether the moments for `gaussian` are stored, so that batches are not needed. Collective."""
        path = self._moments(kind)
        return together(f"{path}: cannot be read", path.exists, only_rank=0)[0]

    def gaussian(self, kind: FeatureKind = "features") -> Gaussian:
        """Mean and covariance of the features, summed in float64; the ranks divide the batches. Collective.

        They are stored in moments-n-N.npz, those of another kind in moments-KIND-n-N.npz, in the format of pytorch-fid:
        mu (D,), sigma (D, D).
        """
        path = self._moments(kind)
        if not self.has_moments(kind):
            gaussian = self._sum_up(kind)
            together(f"{path}: cannot be written", lambda: _save(path, gaussian), only_rank=0)
            return gaussian
        return each_its_own(f"{path}: cannot be read", lambda: _load(path)).to(self.work.accelerator.device)

    def rows(self, kind: FeatureKind = "features") -> torch.Tensor:
        """All of one kind, (N, D) float32, on every rank's device. Collective."""

        def load() -> torch.Tensor:
            parts = [self.work.load(numbers)[kind] for numbers in self.batches]
            return torch.from_numpy(np.concatenate(parts)).to(self.work.accelerator.device)

        return each_its_own(f"{self.work.folder}: cannot be read", load, kind=DataError)

    def _moments(self, kind: FeatureKind) -> Path:
        of = "" if kind == "features" else f"{kind}-"
        return self.work.folder / f"moments-{of}n-{self.count}.npz"

    def _sum_up(self, kind: FeatureKind) -> Gaussian:
        accelerator = self.work.accelerator

        def add_up() -> Moments:
            dimensions = self.work.load(self.batches[0])[kind].shape[1]
            moments = Moments.of(torch.empty(0, dimensions, device=accelerator.device))
            for numbers in self.batches[accelerator.process_index :: accelerator.num_processes]:
                moments += Moments.of(torch.from_numpy(self.work.load(numbers)[kind]).to(accelerator.device))
            return moments

        share = each_its_own(f"{self.work.folder}: cannot be read", add_up, kind=DataError)
        total, outer = sum_over_ranks(share.total), sum_over_ranks(share.outer)
        return Moments(count=self.count, total=total, outer=outer).gaussian()


def _save(path: Path, gaussian: Gaussian) -> None:
    content = io.BytesIO()
    np.savez(content, mu=gaussian.mean.cpu().numpy(), sigma=gaussian.covariance.cpu().numpy())
    write_whole(path, content.getvalue())


def _load(path: Path) -> Gaussian:
    try:
        with np.load(path, allow_pickle=False) as stored:
            mean, covariance = (torch.from_numpy(stored[name]) for name in ("mu", "sigma"))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged ({error}); delete it and run this again") from error
    return Gaussian(mean=mean, covariance=covariance)
