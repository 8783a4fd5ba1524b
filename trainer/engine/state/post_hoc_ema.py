"""Post-hoc EMA: an average of any width from snapshots of a few others (Karras et al. 2024, section 3.2, appendix C).

An average with the power-function profile of gamma, after t updates, weights the network of time tau by p(tau) = (gamma
+ 1) tau^gamma / t^(gamma + 1). A weighted sum of snapshots has the weighted sum of their profiles, so the sum whose
profile is closest to the target's approximates the target average best.
"""

from collections.abc import Sequence

import torch
from ema_pytorch.post_hoc_ema import p_dot_p, sigma_rel_to_gamma
from torch import Tensor


def combination(snapshots: Sequence[tuple[int, float]], *, updates: int, sigma_rel: float) -> tuple[Tensor, float]:
    """Coefficients that combine snapshots, each of (updates so far, sigma_rel), into an average of `sigma_rel` at
    `updates`.

    Least squares between the profiles (algorithm 3), with coefficients constrained to sum to 1: the average of constant
    weights must be those weights, which an unconstrained fit to few snapshots would shrink. Returns the coefficients,
    (S,) float64, and the relative residual, ||sum of profiles - target|| / ||target||.
    """
    t = torch.tensor([float(t) for t, _ in snapshots], dtype=torch.float64)[:, None]
    gamma = torch.tensor([sigma_rel_to_gamma(sigma) for _, sigma in snapshots], dtype=torch.float64)[:, None]
    wanted_t = torch.tensor([[float(updates)]], dtype=torch.float64)
    wanted_gamma = torch.tensor([[sigma_rel_to_gamma(sigma_rel)]], dtype=torch.float64)
    products = p_dot_p(t, gamma, t.T, gamma.T)
    target = p_dot_p(t, gamma, wanted_t, wanted_gamma)
    # Inner products of profiles span many orders of magnitude; those of normalised profiles are at most 1.
    scale = products.diagonal()[:, None].sqrt()
    one = 1 / scale
    system = torch.cat(
        (
            torch.cat((products / (scale * scale.T), one), dim=1),
            torch.cat((one.T, torch.zeros(1, 1, dtype=torch.float64)), dim=1),
        )
    )
    right = torch.cat((target / scale, torch.ones(1, 1, dtype=torch.float64)))
    # lstsq, not solve: profiles of close snapshots are nearly linearly dependent; this gives the minimum-norm solution.
    solution = torch.linalg.lstsq(system, right, driver="gelsd").solution[:-1]
    weights = solution / scale
    length = p_dot_p(wanted_t, wanted_gamma, wanted_t, wanted_gamma)
    left = weights.T @ products @ weights - 2 * weights.T @ target + length
    return weights[:, 0], float((left.clamp(min=0) / length).sqrt())
