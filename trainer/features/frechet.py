"""The Fréchet distance of two sets of features, each taken for a Gaussian (Heusel et al. 2017): FID on Inception's.

d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)). Everything is float64.
"""

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Sums over features x: `total` of x, (D,), and `outer` of x x^T, (D, D); float64. They add up over ranks."""

    count: int
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Self:
        """features: (N, D)."""
        exact = features.double()
        return cls(count=len(exact), total=exact.sum(dim=0), outer=exact.T @ exact)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(count=self.count + other.count, total=self.total + other.total, outer=self.outer + other.outer)

    def gaussian(self) -> "Gaussian":
        """Mean and unbiased covariance. Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"{self.count} features have no covariance")
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean=mean, covariance=covariance)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """mean: (D,), covariance: (D, D), float64; with fewer features than D the covariance has not full rank."""

    mean: torch.Tensor
    covariance: torch.Tensor

    def to(self, device: torch.device) -> "Gaussian":
        """On another device."""
        return Gaussian(mean=self.mean.to(device), covariance=self.covariance.to(device))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """d^2 as above; symmetric, and 0 to rounding for equal Gaussians.

    With S_1 = A^T A and S_2 = B^T B the eigenvalues of S_1 S_2 are the squared singular values of A B^T, and the trace
    of the root is their sum. Unlike a root of S_1 S_2, which is not symmetric, they exist and are real for every
    covariance.
    """
    difference = one.mean - other.mean
    product = _factor(one.covariance) @ _factor(other.covariance).T
    trace = one.covariance.trace() + other.covariance.trace() - 2 * torch.linalg.svdvals(product).sum()
    return float(difference @ difference + trace)


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """A, (R, D), with A^T A = S of rank R: what rounding leaves of eigenvalues that are 0 is left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors[:, kept] * values[kept].sqrt()).T
