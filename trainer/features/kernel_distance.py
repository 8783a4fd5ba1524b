"""The kernel distance of two sets of features (Binkowski et al. 2018): KID on Inception's.

The squared maximum mean discrepancy with the cubic kernel k(x, y) = (x . y / D + 1)^3. The estimate is unbiased: of two
equal distributions it is 0 on average, whatever the number of features, and so as often below 0 as above.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

SUBSETS_SEED = 2020  # torch-fidelity's: the same features give its number


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of features (M, D) and (N, D), M and N at least 2; computed in float64.

    Equation 4 of the paper: mean of k(x, x') over x != x', the same of y, minus twice the mean of k(x, y).
    """
    x, y = x.double(), y.double()
    return float(_mean_of_pairs(_kernel(x, x)) + _mean_of_pairs(_kernel(y, y)) - 2 * _kernel(x, y).mean())


def subsets(
    counts: tuple[int, int], *, number: int, size: int, seed: int = SUBSETS_SEED
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Rows of two sets that are compared, `number` times `size` of each, none twice within a subset; KID is the mean
    over the subsets.
    """
    generator = np.random.RandomState(seed)
    for _ in range(number):
        one, other = (generator.choice(count, size, replace=False) for count in counts)
        yield one, other


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(kernel: torch.Tensor) -> torch.Tensor:
    """Without the diagonal, which makes it unbiased."""
    return (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))
