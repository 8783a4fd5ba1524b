"""Feature metrics: what they need, and their computation over all ranks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional as F
from typing_extensions import override

from trainer.engine.processes.division import map_over_ranks
from trainer.errors import ConfigError, DataError
from trainer.evaluation.feature_sets import FeatureSet
from trainer.evaluation.references import ReferenceStatistics
from trainer.features.frechet import frechet_distance
from trainer.features.gaussian_kernel_distance import BANDWIDTH, SCALE, kernel_sum
from trainer.features.inception_score import score, splits
from trainer.features.kernel_distance import squared_mmd, subsets
from trainer.features.manifold import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    balls_around,
    has_any_within,
    radii,
    within_any,
)
from trainer.features.networks import Convention, FeatureKind
from trainer.sampling.request import batches_of

Item = TypeVar("Item")
Result = TypeVar("Result")
Reference = FeatureSet | ReferenceStatistics | None
_ROWS = 512  # of a distance matrix computed at a time
_MOST = 50_000  # real images in metrics of pairwise distances


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a metric needs: features of this `kind`; of a reference none, or single features, at most `most`, or mean
    and covariance, which a file may have by the names of `statistics`.
    """

    reference: bool
    statistics: tuple[str, str] | None
    most: int | None = None
    kind: FeatureKind = "features"


class FeatureMetric(ABC):
    """One or several numbers computed from features of samples and of a reference."""

    name: str
    needs: Needs

    @abstractmethod
    def title(self, convention: Convention) -> str:
        """Name of the metric as reported: FID, KID and IS only with Inception's features."""

    @abstractmethod
    def check(self, samples: int, reference: int | None) -> None:
        """Raise ConfigError where there are too few samples or reference images (None: unknown number)."""

    @abstractmethod
    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        """The values by name, the main one first. Collective, the same on all ranks."""

    def about(self) -> dict[str, Any]:
        """The metric's settings, for the report."""
        return dict(vars(self))


class FrechetMetric(FeatureMetric):
    """FID (Heusel et al. 2017); see trainer/features/frechet.py."""

    name = "fid"
    needs = Needs(reference=True, statistics=("mu", "sigma"))

    @override
    def title(self, convention: Convention) -> str:
        return "FID" if convention.is_inception else f"Fréchet distance on {convention.network} features"

    @override
    def check(self, samples: int, reference: int | None) -> None:
        for what, count in (("--samples", samples), ("--images", reference)):
            if count is not None and count < 2:
                raise ConfigError(f"{what} {count}: should be at least 2, for a covariance")

    @override
    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        assert reference is not None
        kind = self.needs.kind
        drawn = samples.gaussian(kind)
        real = reference.gaussian(kind) if isinstance(reference, FeatureSet) else reference.distribution
        if drawn.mean.shape != real.mean.shape:
            raise DataError(
                f"{reference.name}: its mean has {len(real.mean)} values, these features {len(drawn.mean)}: it is of "
                "another network",
                agreed=True,
            )
        return {"frechet_distance": frechet_distance(drawn, real.to(drawn.mean.device))}


class SpatialFrechetMetric(FrechetMetric):
    """sFID (Nash et al. 2021): the same distance of features that keep where in the image they are."""

    name = "sfid"
    needs = Needs(reference=True, statistics=("mu_s", "sigma_s"), kind="spatial")

    @override
    def title(self, convention: Convention) -> str:
        return "sFID" if convention.is_inception else f"spatial Fréchet distance on {convention.network} features"

    @override
    def about(self) -> dict[str, Any]:
        return {"layer": "mixed_6/conv, its first 7 maps, 2023 values"}


@dataclass(frozen=True, kw_only=True)
class KernelMetric(FeatureMetric):
    """KID (Binkowski et al. 2018), the mean over subsets; see trainer/features/kernel_distance.py."""

    subsets: int
    subset_size: int
    name = "kid"
    needs = Needs(reference=True, statistics=None, most=_MOST)

    @override
    def title(self, convention: Convention) -> str:
        return "KID" if convention.is_inception else f"kernel distance on {convention.network} features"

    @override
    def check(self, samples: int, reference: int | None) -> None:
        least = min(samples, reference or samples)
        if not 2 <= self.subset_size <= least:
            raise ConfigError(f"--subset-size {self.subset_size}: should be from 2 to {least}, the images there are")

    @override
    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        assert isinstance(reference, FeatureSet)
        x, y = samples.rows(), reference.rows()
        chosen = subsets((len(x), len(y)), number=self.subsets, size=self.subset_size)
        distances = _each(list(chosen), lambda rows: squared_mmd(x[rows[0]], y[rows[1]]))
        return {"kernel_distance": float(np.mean(distances)), "deviation_of_subsets": float(np.std(distances))}


@dataclass(frozen=True, kw_only=True)
class ScoreMetric(FeatureMetric):
    """The Inception score (Salimans et al. 2016), the mean over splits; see trainer/features/inception_score.py."""

    splits: int
    name = "is"
    needs = Needs(reference=False, statistics=None, kind="logits")

    @override
    def title(self, convention: Convention) -> str:
        formula = "the Inception score's formula"
        return "Inception score" if convention.is_inception else f"{formula} on {convention.network} classes"

    @override
    def check(self, samples: int, reference: int | None) -> None:
        if self.splits > samples:
            raise ConfigError(f"--splits {self.splits}: should be at most {samples}, the samples there are")

    @override
    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        logits = samples.rows("logits")
        parts = list(splits(len(logits), self.splits))
        scores = _each(parts, lambda rows: score(logits[rows.to(logits.device)]))
        return {"score": float(np.mean(scores)), "deviation_of_splits": float(np.std(scores))}


class GaussianKernelMetric(FeatureMetric):
    """CMMD (Jayasumana et al. 2024); see trainer/features/gaussian_kernel_distance.py."""

    name = "cmmd"
    needs = Needs(reference=True, statistics=None, most=_MOST)

    @override
    def title(self, convention: Convention) -> str:
        return "CMMD" if convention.is_clip else f"Gaussian kernel distance on {convention.network} features"

    @override
    def check(self, samples: int, reference: int | None) -> None:
        pass  # of one image, too, there is a distance

    @override
    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        assert isinstance(reference, FeatureSet)
        x, y = (F.normalize(features.rows().double(), dim=1) for features in (samples, reference))

        def mean(one: torch.Tensor, other: torch.Tensor) -> float:
            sums = _each(batches_of(len(one), _ROWS), lambda k: kernel_sum(one[k.start : k.stop], other))
            return math.fsum(sums) / (len(one) * len(other))

        return {"gaussian_kernel_distance": SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))}

    @override
    def about(self) -> dict[str, Any]:
        return {"bandwidth": BANDWIDTH, "scale": SCALE}


class ManifoldMetric(FeatureMetric):
    """Precision, recall, density and coverage; see trainer/features/manifold.py."""

    name = "prdc"
    needs = Needs(reference=True, statistics=None, most=_MOST)

    @override
    def title(self, convention: Convention) -> str:
        return f"precision, recall, density and coverage on {convention.network} features"

    @override
    def check(self, samples: int, reference: int | None) -> None:
        least = min(samples, reference or samples)
        if least <= DENSITY_NEIGHBOURS:
            raise ConfigError(f"prdc: needs more than {DENSITY_NEIGHBOURS} samples and images, there are {least}")

    @override
    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        assert isinstance(reference, FeatureSet)
        drawn, real = samples.rows(), reference.rows()
        centre = real.double().mean(dim=0).float()  # distances in float32 are more accurate near 0
        drawn, real = drawn - centre, real - centre

        def by_rows(x: torch.Tensor, function: Callable[[slice], torch.Tensor]) -> torch.Tensor:
            chunks = [slice(rows.start, rows.stop) for rows in batches_of(len(x), _ROWS)]
            return torch.from_numpy(np.concatenate(_each(chunks, lambda k: function(k).cpu().numpy())))

        neighbours = (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)
        drawn_radii = by_rows(drawn, lambda k: radii(drawn[k], drawn, neighbours)).to(drawn.device)
        real_radii = by_rows(real, lambda k: radii(real[k], real, neighbours)).to(real.device)
        narrow, wide = real_radii.T
        precise = by_rows(drawn, lambda k: within_any(drawn[k], real, narrow))
        recalled = by_rows(real, lambda k: within_any(real[k], drawn, drawn_radii[:, 0]))
        dense = by_rows(drawn, lambda k: balls_around(drawn[k], real, wide))
        covered = by_rows(real, lambda k: has_any_within(real[k], wide[k], drawn))
        return {
            "precision": precise.double().mean().item(),
            "recall": recalled.double().mean().item(),
            "density": dense.double().mean().item() / DENSITY_NEIGHBOURS,
            "coverage": covered.double().mean().item(),
        }

    @override
    def about(self) -> dict[str, Any]:
        return {
            "neighbours of precision and recall": PRECISION_NEIGHBOURS,
            "neighbours of density and coverage": DENSITY_NEIGHBOURS,
            "distances": "fp32",
        }


def _each(items: Sequence[Item], function: Callable[[Item], Result]) -> list[Result]:
    """`function` of each item, in order, on every rank; the ranks divide the items."""
    return map_over_ranks(items, function, what="the features: cannot be compared")[0]
