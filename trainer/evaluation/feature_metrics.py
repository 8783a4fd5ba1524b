"""The metrics: what each needs, and how all ranks compute it together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator

from trainer.engine.processes import together
from trainer.engine.sampling import batches_of
from trainer.errors import ConfigError, DataError
from trainer.evaluation.feature_sets import FeatureSet
from trainer.evaluation.references import ReferenceStatistics
from trainer.features.frechet import frechet_distance
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
from trainer.features.networks import Convention

Reference = FeatureSet | ReferenceStatistics | None
_ROWS = 512  # of a matrix of distances at a time
_MOST = 50_000  # real images that samples are compared with one by one


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a metric is made of: of the reference `statistics` or single features, at most so many; or no reference."""

    reference: bool
    statistics: bool
    most: int | None = None


class FeatureMetric(Protocol):
    """A number, or several, by features of samples and of a reference."""

    name: str
    needs: Needs

    def title(self, convention: Convention) -> str:
        """What the number is called where it stands alone: only Inception's are called FID, KID, IS."""

    def check(self, samples: int, reference: int | None) -> None:
        """Raise ConfigError where so many samples and reference images (None: unknown) are too few."""

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        """The numbers by name, the one that matters first. Collective, the same on all ranks."""

    def about(self) -> dict[str, Any]:
        """Its settings."""


class FrechetMetric:
    """FID (Heusel et al. 2017); see trainer/features/frechet.py."""

    name = "fid"
    needs = Needs(reference=True, statistics=True)

    def title(self, convention: Convention) -> str:
        """See `FeatureMetric`."""
        return "FID" if convention.is_inception else f"Fréchet distance on {convention.network} features"

    def check(self, samples: int, reference: int | None) -> None:
        """See `FeatureMetric`."""
        for what, count in (("--samples", samples), ("--images", reference)):
            if count is not None and count < 2:
                raise ConfigError(f"{what} {count}: should be at least 2, for a covariance")

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        """See `FeatureMetric`."""
        assert reference is not None
        drawn, real = samples.gaussian(), reference.gaussian()
        if drawn.mean.shape != real.mean.shape:
            raise DataError(
                f"{reference.name}: mu has {len(real.mean)} values, these features {len(drawn.mean)}: they are of "
                "another network",
                agreed=True,
            )
        return {"frechet_distance": frechet_distance(drawn, real.to(drawn.mean.device))}

    def about(self) -> dict[str, Any]:
        """See `FeatureMetric`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class KernelMetric:
    """KID (Binkowski et al. 2018), the mean over subsets; see trainer/features/kernel_distance.py."""

    subsets: int
    subset_size: int
    name = "kid"
    needs = Needs(reference=True, statistics=False, most=_MOST)

    def title(self, convention: Convention) -> str:
        """See `FeatureMetric`."""
        return "KID" if convention.is_inception else f"kernel distance on {convention.network} features"

    def check(self, samples: int, reference: int | None) -> None:
        """See `FeatureMetric`."""
        least = min(samples, reference or samples)
        if not 2 <= self.subset_size <= least:
            raise ConfigError(f"--subset-size {self.subset_size}: should be from 2 to {least}, the images there are")

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        """See `FeatureMetric`."""
        assert isinstance(reference, FeatureSet)
        x, y = samples.rows("features"), reference.rows("features")
        chosen = subsets((len(x), len(y)), number=self.subsets, size=self.subset_size)
        distances = _shared(samples.work.accelerator, list(chosen), lambda rows: squared_mmd(x[rows[0]], y[rows[1]]))
        return {"kernel_distance": float(np.mean(distances)), "deviation_of_subsets": float(np.std(distances))}

    def about(self) -> dict[str, Any]:
        """See `FeatureMetric`."""
        return {"subsets": self.subsets, "subset_size": self.subset_size}


@dataclass(frozen=True, kw_only=True)
class ScoreMetric:
    """The Inception score (Salimans et al. 2016), the mean over splits; see trainer/features/inception_score.py."""

    splits: int
    name = "is"
    needs = Needs(reference=False, statistics=False)

    def title(self, convention: Convention) -> str:
        """See `FeatureMetric`."""
        formula = "the Inception score's formula"
        return "Inception score" if convention.is_inception else f"{formula} on {convention.network} classes"

    def check(self, samples: int, reference: int | None) -> None:
        """See `FeatureMetric`."""
        del reference
        if self.splits > samples:
            raise ConfigError(f"--splits {self.splits}: should be at most {samples}, the samples there are")

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        """See `FeatureMetric`."""
        del reference
        logits = samples.rows("logits")
        parts = list(splits(len(logits), self.splits))
        scores = _shared(samples.work.accelerator, parts, lambda rows: score(logits[rows.to(logits.device)]))
        return {"score": float(np.mean(scores)), "deviation_of_splits": float(np.std(scores))}

    def about(self) -> dict[str, Any]:
        """See `FeatureMetric`."""
        return {"splits": self.splits}


class ManifoldMetric:
    """Precision, recall, density and coverage; see trainer/features/manifold.py."""

    name = "prdc"
    needs = Needs(reference=True, statistics=False, most=_MOST)

    def title(self, convention: Convention) -> str:
        """See `FeatureMetric`."""
        return f"precision, recall, density and coverage on {convention.network} features"

    def check(self, samples: int, reference: int | None) -> None:
        """See `FeatureMetric`."""
        least = min(samples, reference or samples)
        if least <= DENSITY_NEIGHBOURS:
            raise ConfigError(f"prdc: needs more than {DENSITY_NEIGHBOURS} samples and images, there are {least}")

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        """See `FeatureMetric`."""
        assert isinstance(reference, FeatureSet)
        drawn, real = samples.rows("features"), reference.rows("features")
        centre = real.double().mean(dim=0).float()  # near 0 float32 distances are more exact
        drawn, real = drawn - centre, real - centre
        accelerator = samples.work.accelerator

        def by_rows(x: torch.Tensor, function: Callable[[slice], torch.Tensor]) -> torch.Tensor:
            chunks = [slice(rows.start, rows.stop) for rows in batches_of(len(x), _ROWS)]
            return torch.from_numpy(np.concatenate(_shared(accelerator, chunks, lambda k: function(k).cpu().numpy())))

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

    def about(self) -> dict[str, Any]:
        """See `FeatureMetric`."""
        return {
            "neighbours of precision and recall": PRECISION_NEIGHBOURS,
            "neighbours of density and coverage": DENSITY_NEIGHBOURS,
        }


def _shared(accelerator: Accelerator, items: list[Any], function: Callable[[Any], Any]) -> list[Any]:
    """`function` of each item, in their order, on every rank; each item is worked on by one. Results travel."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    shares = together("the features: cannot be compared", lambda: [function(item) for item in items[rank::ranks]])
    return [shares[number % ranks][number // ranks] for number in range(len(items))]
