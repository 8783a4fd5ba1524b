"""The distance by a Gaussian kernel of two sets of features: CMMD on CLIP's (Jayasumana et al. 2024).

1000 times the squared maximum mean discrepancy of features scaled to unit length, with the kernel
k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10. Each mean is over all pairs, a feature with itself included, as in
the authors' code: so it is 0 for equal sets, and of equal distributions above 0, by less the more features there are.
"""

import torch

BANDWIDTH = 10.0  # sigma
SCALE = 1000.0


def kernel_sum(x: torch.Tensor, y: torch.Tensor) -> float:
    """The sum of k over all pairs of x (M, D) and y (N, D), all of unit length; computed in float64."""
    squared_distance = 2 - 2 * (x.double() @ y.double().T)
    return float(torch.exp(-squared_distance / (2 * BANDWIDTH**2)).sum())
